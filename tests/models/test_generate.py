import dataclasses
import math

import numpy as np
import pytest
import torch

from trivium.losses.logprobs import token_logprobs
from trivium.models import generate as generation
from trivium.models.config import ModelConfig
from trivium.models.generate import filter_logits, generate, invert, stream
from trivium.models.transformer import KVCache, Transformer


@pytest.fixture
def prompts(tokens):
    return [tokens(1, length, seed=index)[0].tolist() for index, length in enumerate([3, 11, 7, 7, 1, 9])]


def test_greedy_equals_transformers(family, reference, prompts):
    theirs = reference(family)
    ours = generate(family, prompts, max_new_tokens=12, temperature=0, stop_ids=frozenset({5}))
    for prompt, made in zip(prompts, ours, strict=True):
        expected = theirs.generate(
            torch.tensor([prompt]), max_new_tokens=12, do_sample=False, eos_token_id=5, pad_token_id=0
        )
        assert made.token_ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_logprobs_are_those_the_trainer_computes(family, prompts, temperature):
    made = generate(family, prompts, max_new_tokens=10, temperature=temperature, seed=4)
    for prompt, completion in zip(prompts, made, strict=True):
        ids = torch.tensor([prompt + completion.token_ids])
        with torch.no_grad():
            logits = family.logits(family(ids[:, :-1]))
        expected = token_logprobs(logits, ids[:, 1:], temperature)[0, len(prompt) - 1 :]
        assert torch.allclose(torch.tensor(completion.logprobs), expected, atol=1e-5)


@pytest.mark.parametrize("how", [{"temperature": 1.0}, {"temperature": 0.8, "top_k": 9, "top_p": 0.9}])
def test_a_row_does_not_depend_on_its_batch_mates(family, prompts, how):
    """Rows end at different steps (a fifth of the vocabulary stops), so they also change places."""
    stops = frozenset(range(8, 20))
    together = generate(family, prompts, max_new_tokens=16, seed=[3, 1], stop_ids=stops, **how)
    assert len({len(made.token_ids) for made in together}) > 2
    in_twos = generate(family, prompts, max_new_tokens=16, seed=[3, 1], stop_ids=stops, batch_size=2, **how)
    more = generate(family, prompts + prompts, max_new_tokens=16, seed=[3, 1], stop_ids=stops, **how)[: len(prompts)]
    first_alone = generate(family, prompts[:1], max_new_tokens=16, seed=[3, 1], stop_ids=stops, **how)
    assert [m.token_ids for m in in_twos] == [m.token_ids for m in together]
    assert [m.token_ids for m in more] == [m.token_ids for m in together]
    assert first_alone[0].token_ids == together[0].token_ids
    for a, b in zip(together, in_twos, strict=True):
        assert np.allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_network_that_is_not_written_out_samples_the_same(tiny, prompts):
    """With a hook (or sharded, or under autocast) the network itself is called, which hides padding, too."""
    model, how = tiny(), {"max_new_tokens": 16, "seed": [3, 1], "stop_ids": frozenset(range(8, 20))}
    written_out = generate(model, prompts, **how)
    calls = []
    model.model.layers[0].register_forward_hook(lambda module, args, out: calls.append(len(out)))
    for size in (len(prompts), 2):
        as_called = generate(model, prompts, batch_size=size, **how)
        assert [m.token_ids for m in as_called] == [m.token_ids for m in written_out]
        for a, b in zip(as_called, written_out, strict=True):
            assert np.allclose(a.logprobs, b.logprobs, atol=1e-5)
    assert len(calls) > 16


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_prompts_that_enter_as_rows_end_draw_what_they_would_have_drawn(family, tokens, monkeypatch, size):
    """Each prompt alone is the definition. Rows end at any step, and the slots run out and are moved back often."""
    prompts = [tokens(1, 1 + seed * 5 % 13, seed=seed)[0].tolist() for seed in range(14)]
    how = {"max_new_tokens": 9, "stop_ids": frozenset(range(8, 16))}
    moved, entered = [], []
    shift, admit = KVCache.shift, generation._Batch.admit
    monkeypatch.setattr(KVCache, "shift", lambda cache, slots: (moved.append(slots), shift(cache, slots)))
    monkeypatch.setattr(generation._Batch, "admit", lambda b, rows: (entered.append(len(rows)), admit(b, rows))[1])
    made = generate(family, prompts, seed=7, batch_size=size, **how)
    assert sum(entered) == len(prompts) and max(entered) == size and len(entered) > len(prompts) / size - 1
    assert min(moved, default=1) > 0 and (moved or size == 5)
    for row, (prompt, one) in enumerate(zip(prompts, made, strict=True)):
        (alone,) = generate(family, [prompt], seed=7, draws=[row], **how)
        assert (one.token_ids, one.finish_reason) == (alone.token_ids, alone.finish_reason)
        assert np.allclose(one.logprobs, alone.logprobs, atol=1e-5)


def test_places_do_not_stand_empty_while_prompts_wait(tiny, tokens, monkeypatch):
    """Sixteen prompts in eight places, a place free at a time: as many rows are read at every step as could be."""
    model = tiny()
    prompts = [tokens(1, 4, seed=seed)[0].tolist() for seed in range(16)]
    read = []
    step = generation._Batch.step
    monkeypatch.setattr(generation._Batch, "step", lambda b, ids: (read.append(len(b.rows)), step(b, ids))[1])
    ends = iter(range(1, 10**6))
    generate(model, prompts, max_new_tokens=40, batch_size=8, on_token=lambda row, token: next(ends) % 11 == 0)
    # While prompts wait a row that ended has left before the step, and the next enters after it: 7 or 8 of 8.
    assert min(read[:8]) >= 7


def test_every_row_that_ends_is_counted_once(family, prompts):
    counts = []
    how = {"max_new_tokens": 9, "seed": 5, "stop_ids": frozenset(range(8, 20))}
    generate(family, prompts, batch_size=4, on_done=counts.append, **how)
    assert sum(counts) == len(prompts)
    assert len(counts) > 2  # as they end, not all at once


def test_prompts_read_in_pieces_give_the_same(family, prompts, monkeypatch):
    whole = generate(family, prompts * 2, max_new_tokens=6, seed=2)
    monkeypatch.setattr(generation, "PREFILL_TOKENS_CPU", 22)  # two prompts at a time, the longest having 11 tokens
    pieces = generate(family, prompts * 2, max_new_tokens=6, seed=2)
    assert [m.token_ids for m in pieces] == [m.token_ids for m in whole]


def test_sampling_without_cache_gives_the_same_tokens(family, prompts):
    """The slow definition: the whole row again for every token, one row at a time, the documented random numbers."""
    made = generate(family, prompts, max_new_tokens=12, seed=9)
    for row, (prompt, completion) in enumerate(zip(prompts, made, strict=True)):
        uniforms = np.random.default_rng([9, row]).random(12)
        ids = list(prompt)
        for u in uniforms:
            with torch.no_grad():
                probabilities = family.logits(family(torch.tensor([ids])))[0, -1].double().softmax(-1).numpy()
            ids.append(int(np.searchsorted(probabilities.cumsum(), u, side="right")))
        assert completion.token_ids == ids[len(prompt) :]


def test_the_seed_decides(tiny, prompts):
    model = tiny()
    run = lambda seed: [m.token_ids for m in generate(model, prompts, max_new_tokens=8, seed=seed)]  # noqa: E731
    torch.manual_seed(1)
    first = run(1)
    torch.manual_seed(2)
    assert run(1) == first
    assert run(2) != first
    same_prompt = generate(model, [prompts[0]] * 5, max_new_tokens=8, seed=1)
    assert len({tuple(m.token_ids) for m in same_prompt}) == 5


def test_tokens_are_drawn_in_proportion():
    """4,000 rows of one prompt against the model's own distribution; the bound is five standard errors."""
    model = Transformer(
        ModelConfig(vocab_size=6, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).init_weights(0)
    with torch.no_grad():
        model.lm_head.weight.mul_(40)
        expected = model.logits(model(torch.tensor([[1, 2]])))[0, -1].div(2.0).softmax(-1)
    made = generate(model, [[1, 2]] * 4000, max_new_tokens=1, temperature=2.0)
    counts = torch.bincount(torch.tensor([m.token_ids[0] for m in made]), minlength=6)
    error = (expected * (1 - expected) / 4000).sqrt()
    assert ((counts / 4000 - expected).abs() <= 5 * error).all()


class TestInversion:
    def test_by_hand_over_the_border_of_two_blocks(self):
        """Four blocks' worth less one of tokens, all but three of probability 0: 1/4, 1/2, 1/4 at 3, 63 and 64."""
        probabilities = torch.zeros(1, 255)
        probabilities[0, [3, 63, 64]] = torch.tensor([0.25, 0.5, 0.25])
        uniforms = [0.0, 0.2499, 0.25, 0.7499, 0.75, 1 - 2.0**-53]
        drawn = [int(invert(probabilities, torch.tensor([u], dtype=torch.float64))) for u in uniforms]
        assert drawn == [3, 3, 63, 63, 64, 64]

    @pytest.mark.parametrize("size", [5, 64, 200, 1000])
    def test_it_is_the_running_sum_over_all_tokens(self, size):
        """Against the definition in float64; a border between tokens may lie off by float32's 6e-8, and no more."""
        generator = torch.Generator().manual_seed(size)
        probabilities = (4 * torch.randn(300, size, generator=generator)).softmax(-1)
        uniforms = torch.rand(300, generator=generator, dtype=torch.float64)
        sums = probabilities.double().cumsum(-1)
        goal = uniforms[:, None] * sums[:, -1:]
        drawn = invert(probabilities, uniforms)
        above = sums.gather(1, drawn[:, None])
        below = above - probabilities.double().gather(1, drawn[:, None])
        assert (above > goal - 1e-6).all() and (below < goal + 1e-6).all()
        expected = torch.searchsorted(sums, goal, right=True)[:, 0]
        assert (drawn == expected).float().mean() > 0.99

    def test_what_has_no_probability_is_never_drawn(self):
        """Shares of 1e-30 and sums that rounding may miss at both ends: the only tokens there are."""
        generator = torch.Generator().manual_seed(0)
        probabilities = torch.rand(500, 640, generator=generator) ** 40
        probabilities[:, ::2] = 0.0
        probabilities[:, :64], probabilities[:, -70:] = 0.0, 0.0
        ends = [0.0, 2.0**-53, 1 - 2.0**-53]
        uniforms = torch.tensor(ends * 100 + torch.rand(200, generator=generator).tolist(), dtype=torch.float64)
        assert (probabilities.gather(1, invert(probabilities, uniforms)[:, None]) > 0).all()


class TestEnds:
    def test_stop_token_is_included_and_ends_the_row(self, tiny, prompts):
        model = tiny()
        free = generate(model, prompts, max_new_tokens=10, seed=1)
        stop = free[2].token_ids[4]
        ended = generate(model, prompts, max_new_tokens=10, seed=1, stop_ids=frozenset({stop}))
        for before, after in zip(free, ended, strict=True):
            where = before.token_ids.index(stop) + 1 if stop in before.token_ids else 10
            assert after.token_ids == before.token_ids[:where]
            assert after.finish_reason == ("stop" if stop in before.token_ids else "length")
            assert len(after.logprobs) == len(after.token_ids)

    def test_callback_sees_every_token_and_may_end_a_row(self, tiny, prompts):
        model = tiny()
        free = generate(model, prompts, max_new_tokens=10, seed=1)
        seen: dict[int, list[int]] = {}

        def on_token(row: int, token: int) -> bool:
            seen.setdefault(row, []).append(token)
            return row == 1 and len(seen[row]) == 3

        ended = generate(model, prompts, max_new_tokens=10, seed=1, on_token=on_token)
        assert [seen[row] for row in range(len(prompts))] == [m.token_ids for m in ended]
        assert ended[1].token_ids == free[1].token_ids[:3]
        assert ended[1].finish_reason == "stop"
        assert [m for i, m in enumerate(ended) if i != 1] == [
            dataclasses.replace(m, logprobs=e.logprobs)
            for i, (m, e) in enumerate(zip(free, ended, strict=True))
            if i != 1
        ]

    def test_the_context_is_never_exceeded(self, tiny, tokens):
        model = tiny(max_position_embeddings=16)
        made = generate(model, [tokens(1, n)[0].tolist() for n in (4, 12, 15)], max_new_tokens=8, seed=1)
        assert [len(m.token_ids) for m in made] == [8, 4, 1]
        assert {m.finish_reason for m in made} == {"length"}


class TestFilters:
    def test_top_k_and_top_p_by_hand(self):
        """Probabilities 0.5, 0.3, 0.15, 0.05: 0.7 is first reached by the likeliest two, 0.5 by the first alone."""
        logits = torch.tensor([[0.15, 0.5, 0.05, 0.3]]).log()
        kept = lambda **how: filter_logits(logits, **how).isfinite()[0].tolist()  # noqa: E731
        assert kept(top_k=3) == [True, True, False, True]
        assert kept(top_p=0.7) == [False, True, False, True]
        assert kept(top_p=0.49) == [False, True, False, False]
        assert kept(top_p=1e-9) == [False, True, False, False]
        assert kept(top_k=9) == [True] * 4
        # top_k first: of 0.5 and 0.3, renormalised, the first alone is 0.625.
        assert kept(top_k=2, top_p=0.6) == [False, True, False, False]

    def test_logprobs_are_those_after_the_filter(self, tiny, prompts):
        model = tiny()
        assert {
            logprob for m in generate(model, prompts, max_new_tokens=5, top_k=1, seed=1) for logprob in m.logprobs
        } == {0.0}
        made = generate(model, prompts, max_new_tokens=1, top_k=2, seed=1)
        for prompt, completion in zip(prompts, made, strict=True):
            with torch.no_grad():
                best = model.logits(model(torch.tensor([prompt])))[0, -1].topk(2)
            expected = dict(zip(best.indices.tolist(), best.values.log_softmax(-1).tolist(), strict=True))
            assert completion.logprobs[0] == pytest.approx(expected[completion.token_ids[0]], abs=1e-5)

    def test_greedy_reports_the_models_own_logprob(self, tiny, prompts):
        model = tiny()
        made = generate(model, prompts[:1], max_new_tokens=1, temperature=0)[0]
        with torch.no_grad():
            expected = model.logits(model(torch.tensor([prompts[0]])))[0, -1].log_softmax(-1).max()
        assert made.logprobs[0] == pytest.approx(expected.item(), abs=1e-5)


class TestStream:
    @pytest.mark.parametrize("temperature", [0.0, 0.9])
    def test_stream_is_row_zero(self, family, prompts, temperature):
        stops = frozenset(range(8, 14))
        streamed = list(stream(family, prompts[1], max_new_tokens=12, temperature=temperature, seed=5, stop_ids=stops))
        whole = generate(family, prompts[1:2], max_new_tokens=12, temperature=temperature, seed=5, stop_ids=stops)[0]
        assert [token for token, _ in streamed] == whole.token_ids
        assert [logprob for _, logprob in streamed] == pytest.approx(whole.logprobs, abs=1e-6)

    def test_mistakes_are_told_at_the_call(self, tiny):
        with pytest.raises(ValueError, match="empty"):
            stream(tiny(), [], max_new_tokens=3)

    def test_gradients_stay_as_the_caller_has_them(self, tiny, prompts):
        for _ in stream(tiny(), prompts[0], max_new_tokens=3):
            assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        ([], {}, "empty"),
        ([8] * 64, {}, "context"),
        ([8, 61], {}, "vocabulary"),
        ([8, -1], {}, "vocabulary"),
        ([8], {"max_new_tokens": 0}, "max_new_tokens"),
        ([8], {"temperature": -1.0}, "temperature"),
        ([8], {"top_p": 0.0}, "top_p"),
        ([8], {"top_k": -1}, "top_k"),
    ],
)
def test_mistakes_are_named(tiny, prompt, options, named):
    with pytest.raises(ValueError, match=named):
        generate(tiny(), [prompt], **{"max_new_tokens": 4, **options})


def test_no_prompts_no_completions(tiny):
    assert generate(tiny(), [], max_new_tokens=4) == []


def test_training_goes_on_after_generation(tiny, prompts):
    """Nothing that sampling leaves behind may be an inference tensor or hold a graph."""
    model = tiny()
    made = generate(model, prompts, max_new_tokens=4)
    ids = torch.tensor([prompts[0] + made[0].token_ids])
    model.logits(model(ids)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert math.isfinite(sum(p.grad.sum().item() for p in model.parameters()))
