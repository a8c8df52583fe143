"""Stage train_tokenizer: a vocabulary learned from the corpus, and the corpus as tokens.

Reads   the corpus of data_prep (`train.jsonl`, `heldout.jsonl`); a tokenizer, where one is to be kept.
Writes  `tokenizer/` (Hugging Face layout, chat template inside), `shards/train` and `shards/heldout` (memory-mapped,
        checksummed, tied to the tokenizer by its fingerprint); summary: vocabulary, tokens, bytes per token.
Paper   byte-level BPE (Radford et al. 2019, section 2.2; Sennrich et al., arXiv:1508.07909).
Watch   bytes per token, held out: below 3 for English the vocabulary is small for the text.

Left out: Unigram and other algorithms; sampling by language.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium.config import Dial, Ref, UserError, bounds
from trivium.data.shards import write_shards
from trivium.data.tokenizer import MIN_VOCAB_SIZE, Tokenizer, train
from trivium.records import read_jsonl
from trivium.runs.manifest import Run

BATCH = 256
"""Documents encoded at a time."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """The vocabulary's size and what it is learned from."""

    corpus: Ref = "data_prep@latest"
    """The clean corpus."""
    vocab_size: int = 4096
    """Tokens, the 256 bytes and the special ones included."""
    train_bytes: int = 200_000_000
    """Learn from this many bytes of the training text at most, from its beginning."""
    tokenizer: Dial[Ref] = ""
    """Keep that of this model or tokenizer run, so that the model can be trained on the shards; empty: learn one."""

    def __post_init__(self) -> None:
        """Refuse a vocabulary that cannot be."""
        bounds(self, vocab_size=(MIN_VOCAB_SIZE, 2**20), train_bytes=(1, None))


def transform(tokenizer: Tokenizer, texts: Iterator[str]) -> Iterator[tuple[list[int], int]]:
    """Yield, for each text, its ids between BOS and EOS, and its length in UTF-8 bytes."""
    while batch := list(itertools.islice(texts, BATCH)):
        for ids, text in zip(tokenizer.encode_documents(batch), batch, strict=True):
            yield ids, len(text.encode("utf-8", "replace"))


def run(config: Config, run: Run) -> None:
    """Train, save, and write both sides of the corpus as shards."""
    corpus = run.parent("corpus")
    tokenizer = kept(run) if config.tokenizer else learned(config, run, corpus)
    tokenizer.save(run.dir / "tokenizer")
    facts: dict[str, Any] = {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint}
    for side in ("train", "heldout"):
        with run.progress(f"encoding {side} documents", _num_texts(corpus / f"{side}.jsonl")) as advance:
            counts = write_shards(
                run.dir / "shards" / side,
                transform(tokenizer, _counted(_texts(corpus / f"{side}.jsonl"), advance)),
                tokenizer_fingerprint=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
            )
        facts |= {f"{side}_{key}": counts[key] for key in ("documents", "tokens", "bytes")}
        facts[f"{side}_bytes_per_token"] = round(counts["bytes"] / counts["tokens"], 4)
    run.spend(tokens=facts["train_tokens"] + facts["heldout_tokens"])
    run.note(**facts)
    _show(tokenizer, corpus, run)


def _show(tokenizer: Tokenizer, corpus: Path, run: Run) -> None:
    """Keep a few held-out texts as their tokens."""
    for text in itertools.islice(_texts(corpus / "heldout.jsonl"), 5):
        run.specimen("tokens", {"text": text[:300], "tokens": tokenizer.pieces(tokenizer.encode(text[:300]))})


def learned(config: Config, run: Run, corpus: Path) -> Tokenizer:
    """Return a tokenizer learned from the training side of the corpus."""
    with run.progress("learning from documents", 0) as advance:
        texts = _limited(_texts(corpus / "train.jsonl"), config.train_bytes)
        return train(_counted(texts, advance), config.vocab_size)


def kept(run: Run) -> Tokenizer:
    """Return the tokenizer of the run or folder in `tokenizer`: the one beside its shards, or inside its model."""
    beside = run.parent("tokenizer") / "tokenizer"
    return Tokenizer.load(beside if beside.is_dir() else run.model("tokenizer"))


def _texts(path: Path) -> Iterator[str]:
    """Yield the texts of a corpus file. Raises UserError when it is missing or empty."""
    if not path.exists() or not path.stat().st_size:
        raise UserError(f"{path} is missing or empty; run data_prep first")
    for row in read_jsonl(path):
        yield row["text"]


def _num_texts(path: Path) -> int:
    """Return how many lines a corpus file has; 0 where there is none."""
    if not path.exists():
        return 0
    with path.open("rb") as lines:
        return sum(1 for _ in lines)


def _counted(texts: Iterator[str], advance: Callable[[int], object]) -> Iterator[str]:
    """Yield the texts, telling `advance` of each."""
    for text in texts:
        yield text
        advance(1)


def _limited(texts: Iterator[str], limit: int) -> Iterator[str]:
    """Yield texts until `limit` bytes have gone by."""
    total = 0
    for text in texts:
        yield text
        total += len(text.encode("utf-8", "replace"))
        if total >= limit:
            return
