"""The microworld: the demo's own text and truth, made from a seed.

A world of people, animals, things and places, of whom everything is known. Its texts train the demo's models; its tests
ask for names and combinations that no training text contains, so every answer is computed and none can be remembered.
"""

from trivium.data.microworld.arithmetic import arithmetic_prompts
from trivium.data.microworld.constitution import critic, judge, principles, reviser
from trivium.data.microworld.corpus import documents
from trivium.data.microworld.demonstrations import instructions
from trivium.data.microworld.held_out_tests import tests
from trivium.data.microworld.preferences import SimulatedAnnotator, annotators, preference_prompts, taste
from trivium.data.microworld.safety import red_team_prompts

__all__ = [
    "SimulatedAnnotator",
    "annotators",
    "arithmetic_prompts",
    "critic",
    "documents",
    "instructions",
    "judge",
    "preference_prompts",
    "principles",
    "red_team_prompts",
    "reviser",
    "taste",
    "tests",
]
