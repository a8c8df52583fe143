"""A tokenizer that TRL's trainers ask for where the rows are ids already: one word per id."""

from __future__ import annotations

from typing import Any

from side_by_side import Shape


def peer_tokenizer(shape: Shape) -> Any:
    """Return transformers' tokenizer of a vocabulary whose words are the ids; 0 is padding, 1 the end, 2 the start."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{index}": index for index in range(shape.vocab_size)}, unk_token="w3"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="w0", eos_token="w1", bos_token="w2", unk_token="w3", padding_side="left"
    )
