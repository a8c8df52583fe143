import pytest
import torch

from trivium.config import UserError
from trivium.evals.multiple_choice import choose, encode_pair
from trivium.evals.tasks import Item


def item(context, choices, answer=0):
    return Item(id="1", task="t@1", kind="choice", context=context, choices=tuple(choices), answer=answer)


@pytest.mark.parametrize(
    ("context", "choice"),
    [
        ("The cat", " sat."),
        ("The cat ", "sat."),
        ("The cat  ", "sat."),
        ("The c", "at sat."),
        ("", "The cat"),
        ("2 + 3 = ", "5"),
    ],
)
def test_context_and_choice_are_read_as_running_text(tokenizer, context, choice):
    ids, counted = encode_pair(tokenizer, context, choice, 100)
    assert ids == [tokenizer.bos_id, *tokenizer.encode(context + choice)]
    assert ids.count(tokenizer.bos_id) == 1 and not counted[0]
    assert counted == sorted(counted), "the choice is the end of the row"
    part = tokenizer.decode([i for i, c in zip(ids, counted, strict=True) if c])
    assert part.endswith(choice) and (context + choice).endswith(part)


def test_trailing_spaces_count_with_the_choice(tokenizer):
    with_space = encode_pair(tokenizer, "The cat ", "sat.", 100)
    assert with_space == encode_pair(tokenizer, "The cat", " sat.", 100)


def test_a_token_across_the_boundary_counts(tokenizer):
    ids, counted = encode_pair(tokenizer, "The ca", "t", 100)
    assert tokenizer.encode("The cat")[-1] not in tokenizer.encode("The ca")
    assert any(counted) and len(ids) == len(counted)


def test_a_row_that_is_too_long_loses_its_beginning_and_a_choice_that_is_too_long_is_refused(tokenizer):
    whole, _ = encode_pair(tokenizer, "The cat sat on the mat." * 9, " A dog ran.", 1000)
    ids, counted = encode_pair(tokenizer, "The cat sat on the mat." * 9, " A dog ran.", 20)
    assert len(ids) == 21 and ids == whole[-21:] and any(counted)
    with pytest.raises(UserError, match="does not fit"):
        encode_pair(tokenizer, "The", " cat sat on the mat" * 9, 20)


def test_the_likeliest_choice_wins_by_a_full_forward(model, tokenizer):
    items = [
        item(c, [" sat on the mat.", " ran in the tree."]) for c in ("The cat", "A dog", "Anna", "The bird in the")
    ]

    def loglikelihood(context, choice):
        ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(context + choice)]])
        start = 1 + len(tokenizer.encode(context))
        logprobs = model.logits(model(ids))[0].log_softmax(-1)
        return sum(logprobs[t - 1, ids[0, t]].item() for t in range(start, ids.shape[1])) / len(choice)

    expected = [float(loglikelihood(i.context, i.choices[0]) > loglikelihood(i.context, i.choices[1])) for i in items]
    assert choose(model, tokenizer, items) == expected
    swapped = [item(i.context, i.choices[::-1], answer=1) for i in items]
    assert choose(model, tokenizer, swapped) == expected


def test_length_alone_decides_nothing(tokenizer):
    class Flat(torch.nn.Module):
        config = type("C", (), {"max_position_embeddings": 99})

        def __init__(self):
            super().__init__()
            self.anchor = torch.nn.Parameter(torch.zeros(1))

        def forward(self, ids):
            return ids.float().unsqueeze(-1)

        def logits(self, hidden):
            return torch.zeros(*hidden.shape[:-1], 320)

    # one byte a token: a flat model gives every byte the same, so the choices tie and share the point
    assert choose(Flat(), tokenizer, [item("", ["zq", "zqzqzq"]), item("", ["zz", "qq", "zq", "qz"])]) == [0.5, 0.25]
