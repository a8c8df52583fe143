"""Where data comes from: files, folders, Hugging Face datasets and code, read so that nothing is lost unseen.

A *spec* is a path (a file or a folder of txt, md, html, jsonl, json, parquet, each also as .gz where it is text),
`"hf:NAME[:SPLIT]"` (needs a network), or `"module:attribute"` (called as `attribute(seed, **options)`). Whatever cannot
be used is quarantined with file, line, column and reason: `read = kept + quarantined`, always.
"""

from trivium.data.sources.intake import Intake
from trivium.data.sources.load import (
    load_conversations,
    load_documents,
    load_preferences,
    load_prompts,
    load_rows,
)
from trivium.data.sources.schemas import Judgement

__all__ = [
    "Intake",
    "Judgement",
    "load_conversations",
    "load_documents",
    "load_preferences",
    "load_prompts",
    "load_rows",
]
