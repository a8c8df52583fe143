"""Stage data_prep: raw text of any kind becomes a clean corpus, with a reason for everything that was left out.

Reads   `sources`: files, folders, Hugging Face datasets or code; see `trivium.data.sources`.
Writes  `train.jsonl`, `heldout.jsonl` (id, text, source, license), `quarantine.jsonl` (what could not be read),
        `README.md` (the data card); specimens `dropped`; summary `counts`: read = kept + quarantined + dropped.
Paper   quality and repetition rules of MassiveText (arXiv:2112.11446), near duplicates by MinHash (Lee et al.,
        arXiv:2107.06499), decontamination by 13-grams (arXiv:2005.14165, appendix C).
Watch   one reason that drops a large share: read its specimens before you believe the rule.

Left out: classifiers of quality and of toxicity, personal data, and corpora larger than memory.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from trivium.config import CodeRef, ConfigError, InputPath, UserError, bounds, load_attribute
from trivium.data.decontaminate import Contamination, item_texts
from trivium.data.dedup import NearDuplicates, assign_sides, content_key
from trivium.data.filters import Filter, built_in, clean_text, first_reason
from trivium.data.language import guesser
from trivium.data.sources import Intake, load_documents, load_rows
from trivium.records import Document, atomic_write, write_jsonl
from trivium.runs.manifest import Run

SPLIT_SIMILARITY = 0.7
"""Documents at least this similar stay on one side of the split, also where near duplicates are kept."""

SPECIMEN_CHARS = 400


@dataclass(frozen=True, kw_only=True)
class Config:
    """What to read, and what is good enough."""

    sources: tuple[InputPath, ...]
    """Files, folders, `hf:NAME[:SPLIT]`, or `module:attribute` called as `attribute(seed, **options)`."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments for sources that are code."""
    languages: tuple[str, ...] = ("en",)
    """Languages to keep (ISO 639-1); empty keeps all and skips the rules that know English."""
    min_chars: int = 50
    """Shorter documents are dropped, in characters."""
    min_words: int = 10
    """Shorter documents are dropped, in words."""
    built_in_filters: bool = True
    """Whether the built-in filters and the removal of boilerplate lines apply."""
    filters: tuple[CodeRef, ...] = ()
    """Filters of your own, `module:attribute`, each a function from Document to None or a reason."""
    near_duplicates: float = 0.8
    """Drop a document whose five-word sequences agree with an earlier one's to this share; 0 keeps them."""
    decontaminate_against: tuple[InputPath, ...] = ()
    """Test items (any JSON Lines schema, or code); documents that share thirteen words with one are dropped."""
    heldout_frac: float = 0.02
    """Fraction of documents held out for measuring; near duplicates always fall on the same side."""
    max_bad: int | None = None
    """How many unreadable records to accept; none given means any number (they are counted and quarantined)."""
    max_documents: int | None = None
    """Stop after reading this many documents: for trying out."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant."""
        bounds(self, min_chars=(0, None), min_words=(0, None), heldout_frac=(0.0001, 0.5), near_duplicates=(0, 1))
        bounds(self, max_bad=(0, None), max_documents=(2, None))
        if not self.sources:
            raise ConfigError("sources is empty; name at least one file, folder or module:attribute")
        if 0 < self.near_duplicates < SPLIT_SIMILARITY:
            raise ConfigError(f"near_duplicates = {self.near_duplicates}: must be 0 or {SPLIT_SIMILARITY} to 1")


def transform(
    document: Document, filters: list[Filter], contamination: Contamination, *, clean: bool
) -> tuple[Document, str | None]:
    """Return the cleaned document and None, or with the reason to drop it."""
    text, removed = clean_text(document.text) if clean else (document.text, "")
    cleaned = document if text == document.text else replace(document, text=text)
    if len(removed) > len(text):
        return document, "boilerplate"
    reason = first_reason(cleaned, filters)
    if reason is None and contamination.find(text) is not None:
        reason = "contaminated"
    return cleaned, reason


def run(config: Config, run: Run) -> None:
    """Read, clean, filter, deduplicate and split; every step counts what it takes away."""
    rules = list(load_attribute(name) for name in config.filters)
    if config.built_in_filters:
        rules = built_in(min_chars=config.min_chars, min_words=config.min_words, languages=config.languages) + rules
    contamination = Contamination(_test_texts(config, run))
    max_bad = 0 if run.settings.strict else config.max_bad
    intake = Intake(max_bad=max_bad, quarantine=run.dir / "quarantine.jsonl")
    dropped: Counter[str] = Counter()
    corpus = Corpus(config.near_duplicates)

    with run.progress("documents", config.max_documents or 0) as advance:
        for raw in _documents(config, run, intake):
            advance(1, kept=len(corpus.kept))
            document, reason = transform(raw, rules, contamination, clean=config.built_in_filters)
            reason = reason or corpus.add(document)
            if reason is not None:
                dropped[reason] += 1
                shown = {"reason": reason, "text": raw.text[:SPECIMEN_CHARS], "source": raw.source}
                # Two of each reason first, so that a frequent one does not crowd out the rest.
                if dropped[reason] <= 2:
                    run.specimen("dropped", shown)

    _check(corpus, intake, dropped, config)
    train, heldout = corpus.split(config.heldout_frac)
    for name, documents in (("train", train), ("heldout", heldout)):
        write_jsonl(run.dir / f"{name}.jsonl", map(_row, documents))
    counts = _counts(intake, dropped, train, heldout)
    atomic_write(run.dir / "README.md", data_card(config, counts, corpus.kept))
    run.note(counts=counts, files=counts.pop("files"), language_guesser=guesser(), ignored_files=intake.ignored[:50])


class Corpus:
    """The documents kept so far, and what is needed to know a duplicate."""

    def __init__(self, near_duplicates: float) -> None:
        """Start empty; `near_duplicates` is the similarity from which a document is dropped (0: never)."""
        self.kept: list[Document] = []
        self._limit = near_duplicates
        self._keys: set[bytes] = set()
        self._near = NearDuplicates(SPLIT_SIMILARITY)
        self._numbers: list[int] = []
        self._dropped: set[int] = set()

    def add(self, document: Document) -> str | None:
        """Keep the document and return None, or the reason why it is a duplicate."""
        key = content_key(document.text)
        if key in self._keys:
            return "duplicate"
        self._keys.add(key)
        number, similar = self._near.add(document.text)
        if self._limit and any(s >= self._limit and other not in self._dropped for other, s in similar):
            self._dropped.add(number)
            return "near duplicate"
        self.kept.append(document)
        self._numbers.append(number)
        return None

    def split(self, heldout_frac: float) -> tuple[list[Document], list[Document]]:
        """Return (train, held out); what resembles each other stays together."""
        groups = [self._near.group(number) for number in self._numbers]
        sides = assign_sides(groups, [document.id for document in self.kept], heldout_frac)
        train = [d for d, held in zip(self.kept, sides, strict=True) if not held]
        return train, [d for d, held in zip(self.kept, sides, strict=True) if held]


def _documents(config: Config, run: Run, intake: Intake) -> Iterator[Document]:
    """Yield the raw documents, at most `max_documents`."""
    documents = load_documents(config.sources, base=run.base, seed=run.seed, options=config.options, intake=intake)
    for number, document in enumerate(documents, 1):
        yield document
        if number == config.max_documents:
            return


def _test_texts(config: Config, run: Run) -> Iterator[str]:
    """Yield the texts of all test items; a test file that cannot be read is an error, never a silent gap."""
    for row in load_rows(config.decontaminate_against, base=run.base, seed=run.seed):
        yield from item_texts(row)


def _check(corpus: Corpus, intake: Intake, dropped: Counter[str], config: Config) -> None:
    """Raise UserError when nothing, or too little to hold anything out, is left."""
    if len(corpus.kept) >= 2:
        return
    reasons = ", ".join(f"{reason} {n}" for reason, n in (dropped + intake.reasons).most_common(5)) or "none"
    where = ", ".join(config.sources)
    if not corpus.kept:
        places = ", ".join(f"{bad['file']}:{bad['line']} {bad['reason']}" for bad in intake.bad[:2])
        raise UserError(
            f"no document of {where} is left: {intake.read} read; reasons: {reasons}"
            f"{f' ({places})' if places else ''}; give other text, or loosen the filters"
        )
    raise UserError(f"only one document of {where} is left, so none can be held out; add text (reasons: {reasons})")


def _counts(intake: Intake, dropped: Counter[str], train: list[Document], heldout: list[Document]) -> dict[str, Any]:
    """Return the account of what became of every record."""
    return {
        "read": intake.read,
        "quarantined": intake.quarantined,
        "dropped": dict(dropped.most_common()),
        "kept": len(train) + len(heldout),
        "train": len(train),
        "heldout": len(heldout),
        "train_bytes": sum(len(d.text.encode("utf-8", "replace")) for d in train),
        "heldout_bytes": sum(len(d.text.encode("utf-8", "replace")) for d in heldout),
        "quarantine_reasons": dict(intake.reasons.most_common()),
        "files": {name: dict(counts) for name, counts in intake.files.items()},
    }


def _row(document: Document) -> dict[str, str]:
    return {"id": document.id, "text": document.text, "source": document.source, "license": document.license}


def data_card(config: Config, counts: dict[str, Any], kept: list[Document]) -> str:
    """Return the corpus's README: what it holds, where it is from, under which licences, and what was left out."""
    licences = Counter(document.license or "not stated" for document in kept)
    lines = ["# Data card", "", f"Sources: {', '.join(f'`{s}`' for s in config.sources)}", ""]
    lines += [f"- {key}: {counts[key]:,}" for key in ("read", "quarantined", "kept", "train", "heldout")]
    lines += [f"- bytes: {counts['train_bytes']:,} for training, {counts['heldout_bytes']:,} held out", ""]
    for title, table in (
        ("Dropped", counts["dropped"]),
        ("Quarantined", counts["quarantine_reasons"]),
        ("Licences kept", licences),
    ):
        if table:
            lines += [f"## {title}", "", "| what | documents |", "|---|---:|"]
            lines += [f"| {name} | {n:,} |" for name, n in sorted(table.items(), key=lambda pair: (-pair[1], pair[0]))]
            lines.append("")
    settings = {"languages": config.languages, "near_duplicates": config.near_duplicates}
    lines.append(f"Settings: `{json.dumps(settings)}`. Every drop has a reason; specimens are in `specimens.jsonl`.")
    return "\n".join(lines) + "\n"
