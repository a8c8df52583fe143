"""The fixed facts of the microworld: what its animals, things, places and workers are like.

Everything here is true in every text of the microworld, for every seed. Facts that follow from a kind (all birds have
feathers) are *derived*: a fifth of the pairs (animal, derived fact) and (thing, derived fact) is never written in any
training text, so a test can ask for them and only a model that has learned the kinds can answer.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from trivium.data.microworld.names import Split, held_out, on_side, pick_allowed


@dataclass(frozen=True, slots=True)
class Animal:
    """An animal: its kind decides the derived facts, the rest is its own."""

    name: str
    plural: str
    kind: str
    home: str
    food: str
    look: str
    habit: str


@dataclass(frozen=True, slots=True)
class Thing:
    """A thing: its category decides what people do with it, its material how it feels."""

    name: str
    plural: str
    category: str
    material: str = ""


def _animals(kind: str, table: str) -> list[Animal]:
    rows = [[cell.strip() for cell in line.split("|")] for line in table.strip().splitlines()]
    return [Animal(name, plural, kind, home, food, look, habit) for name, plural, home, food, look, habit in rows]


ANIMALS: tuple[Animal, ...] = (
    *_animals(
        "mammal",
        """
        dog | dogs | a house | meat | brown | guards the door
        cat | cats | a house | mice | grey | sleeps in the sun
        horse | horses | a farm | grass | brown | runs very fast
        cow | cows | a farm | grass | white | gives milk
        goat | goats | a farm | leaves | white | climbs on rocks
        pig | pigs | a farm | roots | pink | rolls in the mud
        fox | foxes | the forest | mice | red | hunts at night
        bear | bears | the forest | honey | brown | sleeps all winter
        wolf | wolves | the forest | meat | grey | sings at the moon
        deer | deer | the forest | leaves | brown | hides in the trees
        mouse | mice | a hole | seeds | grey | runs from the cat
        rabbit | rabbits | a hole | carrots | white | jumps over the grass
        lion | lions | a warm land | meat | yellow | rests under a tree
        """,
    ),
    *_animals(
        "bird",
        """
        owl | owls | the forest | mice | brown | hunts at night
        crow | crows | the forest | seeds | black | steals shiny things
        robin | robins | a garden | worms | red | sings in the morning
        sparrow | sparrows | a garden | seeds | brown | hops on the grass
        duck | ducks | a pond | plants | green | dives for its food
        swan | swans | a lake | plants | white | has a long neck
        eagle | eagles | the mountains | fish | brown | sees very far
        hen | hens | a farm | seeds | red | gives eggs
        goose | geese | a farm | grass | grey | walks in a line
        gull | gulls | the coast | fish | white | follows the boats
        """,
    ),
    *_animals(
        "fish",
        """
        trout | trout | a river | flies | silver | jumps at night
        salmon | salmon | a river | worms | pink | travels very far
        shark | sharks | the sea | other fish | grey | never stops moving
        herring | herring | the sea | plants | silver | moves in big groups
        carp | carp | a pond | worms | golden | grows very old
        pike | pike | a lake | other fish | green | waits in the weeds
        """,
    ),
    *_animals(
        "insect",
        """
        bee | bees | a garden | flowers | yellow | makes honey
        ant | ants | a hole | seeds | black | carries heavy things
        wasp | wasps | a garden | fruit | yellow | can sting you
        beetle | beetles | the forest | leaves | black | hides under stones
        moth | moths | the forest | leaves | grey | comes to the light
        cricket | crickets | a field | grass | green | sings on warm nights
        """,
    ),
)

KIND_FACTS: dict[str, dict[str, str]] = {
    "mammal": {"cover": "fur", "legs": "four legs", "young": "drinks milk when it is young", "part": "soft ears"},
    "bird": {"cover": "feathers", "legs": "two legs", "young": "is a chick when it is young", "part": "wings"},
    "fish": {"cover": "scales", "legs": "no legs", "young": "is born in the water", "part": "fins"},
    "insect": {"cover": "a hard skin", "legs": "six legs", "young": "is a grub when it is young", "part": "feelers"},
}
"""Derived facts of animals: kind, then aspect, then the words of the fact."""

CATEGORY_USE: dict[str, str] = {
    "food": "eat",
    "drink": "drink",
    "clothes": "wear",
    "toy": "play with",
    "tool": "work with",
    "instrument": "make music with",
    "vehicle": "travel in",
}
"""Derived facts of things: what one does with them."""

MATERIAL_FEEL: dict[str, str] = {
    "wood": "can float",
    "wool": "keeps you warm",
    "iron": "rusts in the rain",
    "glass": "breaks easily",
    "paper": "tears easily",
}
"""Derived facts of things: what their material does."""


_PLURALS = {"knife": "knives", "shelf": "shelves", "brush": "brushes", "box": "boxes", "scarf": "scarves"}
_PLURALS |= {"dress": "dresses", "peach": "peaches", "cherry": "cherries", "bus": "buses"}


def _things(category: str, table: str) -> list[Thing]:
    result = []
    for entry in table.split(","):
        name, _, material = entry.strip().partition(":")
        plural = _PLURALS.get(name, name + "s")
        result.append(Thing(name, plural, category, material))
    return result


THINGS: tuple[Thing, ...] = (
    *_things("food", "apple, pear, plum, cherry, peach, carrot, onion, bean, egg, cake, pie, nut"),
    *_things("drink", "milk, water, tea, juice, lemonade"),
    *_things("clothes", "hat:wool, scarf:wool, coat:wool, sock:wool, glove:wool, dress, shirt, belt"),
    *_things("toy", "ball, kite:paper, doll:wood, puzzle:paper, top:wood"),
    *_things(
        "tool", "hammer:iron, knife:iron, saw:iron, spade:iron, brush:wood, ladder:wood, bucket, rope, needle:iron"
    ),
    *_things("instrument", "flute:wood, drum, bell:iron, horn, fiddle:wood"),
    *_things("vehicle", "boat:wood, cart:wood, train:iron, bus, sled:wood"),
    *_things(
        "object", "lamp:glass, bottle:glass, mirror:glass, window:glass, vase:glass, jar:glass, pot:iron, key:iron"
    ),
    *_things(
        "object", "book:paper, letter:paper, map:paper, card:paper, table:wood, chair:wood, door:wood, spoon:wood"
    ),
    *_things(
        "object",
        "box:wood, shelf:wood, bed:wood, blanket:wool, rug:wool, nail:iron, clock, basket, candle, stone, coin",
    ),
)
MASS_WORDS = frozenset({"milk", "water", "tea", "juice", "lemonade"})
THING = {thing.name: thing for thing in THINGS}
ANIMAL = {animal.name: animal for animal in ANIMALS}
CARRIED = tuple(
    t.name for t in THINGS if t.category in ("toy", "clothes", "object", "instrument") and t.name not in
    ("window", "table", "bed", "door", "shelf", "sock", "glove", "nail", "stone", "belt")
)  # fmt: skip
"""Things that one person can hand to another."""

WORKERS: dict[str, tuple[str, str, str]] = {
    "baker": ("bread", "bakery", "makes bread"),
    "farmer": ("corn", "farm", "grows corn"),
    "teacher": ("children", "school", "teaches children"),
    "doctor": ("sick people", "hospital", "helps sick people"),
    "smith": ("iron tools", "workshop", "makes iron tools"),
    "tailor": ("clothes", "shop", "makes clothes"),
    "fisher": ("fish", "harbour", "catches fish"),
    "gardener": ("flowers", "garden", "grows flowers"),
    "painter": ("pictures", "studio", "paints pictures"),
    "driver": ("a bus", "street", "drives a bus"),
    "singer": ("songs", "theatre", "sings songs"),
    "writer": ("books", "library", "writes books"),
    "cook": ("soup", "kitchen", "makes soup"),
    "builder": ("houses", "street", "builds houses"),
}
"""Worker: (object of the work, place of work, what the worker does)."""

ROOMS = (
    "kitchen",
    "garden",
    "bedroom",
    "barn",
    "school",
    "library",
    "market",
    "park",
    "shop",
    "hall",
    "attic",
    "cellar",
)
PLACES: dict[str, tuple[str, str]] = {
    "kitchen": ("a stove and a big table", "people cook there"),
    "garden": ("flowers and an old tree", "things grow there"),
    "forest": ("tall trees and quiet paths", "many animals live there"),
    "school": ("desks and many books", "children learn there"),
    "market": ("fruit, fish and loud voices", "people buy food there"),
    "library": ("long shelves full of books", "people read there"),
    "beach": ("warm sand and small waves", "children build castles there"),
    "harbour": ("boats and hungry gulls", "the boats come home there"),
    "farm": ("a barn and wide fields", "food is grown there"),
    "park": ("green grass and long benches", "people meet there"),
    "mountain": ("high rocks and cold snow", "the air is clear there"),
    "river": ("cool water and smooth stones", "one can fish there"),
    "bakery": ("a hot oven and fresh bread", "the baker works there"),
    "station": ("long trains and a big clock", "journeys begin there"),
    "theatre": ("red seats and bright lights", "singers perform there"),
    "village": ("little houses and one street", "everybody knows everybody there"),
}
"""Place: (what one finds there, what happens there)."""

WEATHER: dict[str, tuple[str, str]] = {
    "rain": ("it makes the plants grow", "wet and soft"),
    "snow": ("they can build a snowman", "white and cold"),
    "sunshine": ("it warms their faces", "bright and warm"),
    "wind": ("it lifts their kites", "fresh and wild"),
    "spring": ("the flowers come back", "green and mild"),
    "summer": ("the days are long", "hot and bright"),
    "autumn": ("the leaves turn red", "golden and cool"),
    "winter": ("they can sit by the fire", "dark and cold"),
}
"""Weather and seasons: (why people like it, what it is like)."""

HOBBIES: dict[str, tuple[str, str]] = {
    "reading": ("it takes them to new places", "quiet"),
    "singing": ("it makes them feel free", "cheerful"),
    "cooking": ("good food brings friends together", "useful"),
    "fishing": ("the water makes them calm", "slow"),
    "painting": ("it shows what they feel", "colourful"),
    "dancing": ("the music moves their feet", "lively"),
    "swimming": ("it makes them strong", "healthy"),
    "walking": ("they see new things on the way", "simple"),
    "gardening": ("they can eat what they grow", "peaceful"),
    "drawing": ("it needs only paper and time", "easy"),
}
"""Hobbies: (why people like it, what it is like)."""

OPPOSITES = (
    ("big", "small"), ("hot", "cold"), ("wet", "dry"), ("old", "new"), ("fast", "slow"), ("high", "low"),
    ("open", "closed"), ("full", "empty"), ("loud", "quiet"), ("light", "dark"), ("happy", "sad"), ("hard", "soft"),
    ("long", "short"), ("clean", "dirty"), ("heavy", "light"), ("rich", "poor"), ("strong", "weak"), ("near", "far"),
)  # fmt: skip
COLOURS = ("red", "blue", "green", "yellow", "black", "white", "brown", "grey")
ADJECTIVES = (*COLOURS, "big", "small", "old", "new", "clean", "pretty")
GROUPS: dict[str, tuple[str, ...]] = {
    "fruits": ("apples", "pears", "plums", "cherries", "peaches"),
    "colours": COLOURS,
    "farm animals": ("horses", "cows", "goats", "pigs", "hens", "geese"),
    "forest animals": ("foxes", "bears", "wolves", "deer", "owls"),
    "birds": ("owls", "crows", "robins", "sparrows", "ducks", "swans", "eagles"),
    "insects": ("bees", "ants", "wasps", "beetles", "moths"),
    "tools": ("hammers", "knives", "saws", "spades", "brushes", "ladders"),
    "kinds of clothes": ("hats", "scarves", "coats", "dresses", "shirts", "socks"),
    "toys": ("balls", "kites", "dolls", "puzzles"),
    "drinks": ("milk", "water", "tea", "juice", "lemonade"),
    "seasons": ("spring", "summer", "autumn", "winter"),
}
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()


def an(word: str) -> str:
    """Return the word with its article: `an owl`, `a red hat`, and no article before what cannot be counted."""
    if word in MASS_WORDS:
        return word
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def cap(text: str) -> str:
    """Return the text with its first letter in upper case."""
    return text[:1].upper() + text[1:]


def listing(words: list[str] | tuple[str, ...]) -> str:
    """Return the words as `a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def described(rng: random.Random, noun: str, split: Split = "train") -> str:
    """Return the noun with an adjective, a pair that belongs to the given side of the split."""
    return f"{pick_allowed(rng, ADJECTIVES, split, 'adjective', noun)} {noun}"


def coloured(rng: random.Random, noun: str, split: Split = "train") -> tuple[str, str]:
    """Return a colour for the noun (a pair of the given side) and the two together."""
    colour = pick_allowed(rng, COLOURS, split, "adjective", noun)
    return colour, f"{colour} {noun}"


def home(animal: Animal) -> str:
    """Return where an animal lives, with its preposition: `on a farm`, `in the forest`."""
    return f"{'on' if animal.home in ('a farm', 'the coast') else 'in'} {animal.home}"


def animal_fact(animal: Animal, aspect: str) -> str:
    """Return the derived fact of an animal as a verb phrase, such as `has feathers`."""
    words = KIND_FACTS[animal.kind][aspect]
    return words if aspect == "young" else f"has {words}"


def known_aspects(animal: Animal) -> list[str]:
    """Return the aspects whose derived fact about this animal may be written in training text."""
    return [a for a in KIND_FACTS[animal.kind] if not held_out("animal", animal.name, a)]


def thing_facts(thing: Thing, split: Split = "train") -> list[str]:
    """Return the derived facts of a thing on one side of the split, as verb phrases (`is something you eat`)."""
    facts = []
    if thing.category in CATEGORY_USE and on_side(split, "thing", thing.name, "use"):
        facts.append(f"is something you {CATEGORY_USE[thing.category]}")
    if thing.material and on_side(split, "thing", thing.name, "material"):
        facts.append(MATERIAL_FEEL[thing.material])
    return facts
