"""What transformers computes by its own road: a flattened batch, and the log-probabilities of what it generated."""

from __future__ import annotations

import pytest
import torch

from trivium.batches import IGNORE
from trivium.models.generate import generate


def test_packed_is_transformers_flattened_batch(family, reference, tokens) -> None:
    """Rows 9 and 10: `DataCollatorWithFlattening`'s row, read by transformers as three documents, gives our logits."""
    collator = pytest.importorskip("transformers").DataCollatorWithFlattening
    lengths = [7, 2, 12]
    features = [{"input_ids": tokens(1, length, seed=length)[0].tolist()} for length in lengths]
    batch = collator()(features)
    with torch.no_grad():
        expected = reference(family)(
            input_ids=batch["input_ids"], position_ids=batch["position_ids"], attention_mask=None, use_cache=False
        ).logits
        documents = (batch["position_ids"] == 0).cumsum(-1)
        found = family.logits(family(batch["input_ids"], positions=batch["position_ids"], document_ids=documents))
    assert (found - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))
    # Read as one document, the row would be another: the comparison could fail.
    with torch.no_grad():
        assert (family.logits(family(batch["input_ids"])) - expected).abs().max() > 1e-2
    # Shifted once, as our batches are: no target is the first token of a document.
    targets = batch["labels"][0].roll(-1)
    targets[-1] = IGNORE
    assert int((targets != IGNORE).sum()) == sum(length - 1 for length in lengths)


def test_greedy_logprobs_are_transformers_transition_scores(family, reference, tokens) -> None:
    """What `compute_transition_scores` says of the same tokens."""
    theirs = reference(family)
    prompt = tokens(1, 6, seed=3)
    made = generate(family, [prompt[0].tolist()], max_new_tokens=10, temperature=0, stop_ids=frozenset())[0]
    out = theirs.generate(
        prompt,
        max_new_tokens=10,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    scores = theirs.compute_transition_scores(out.sequences, out.scores, normalize_logits=True)[0]
    assert made.token_ids == out.sequences[0, 6:].tolist()
    assert torch.allclose(torch.tensor(made.logprobs), scores, atol=1e-5)
