import copy
import math

import pytest
import torch
from torch import nn

from trivium.models.config import ModelConfig
from trivium.models.generate import generate
from trivium.models.hf import load_model, save_model
from trivium.models.transformer import KVCache, RMSNorm, Transformer


def test_logits_equal_transformers(family, reference, tokens):
    theirs = reference(family)
    ids = tokens(3, 24)
    with torch.no_grad():
        ours, expected = family.logits(family(ids)), theirs(ids).logits
    assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)


def test_gradients_equal_transformers(family, reference, tokens):
    theirs = reference(family)
    ids = tokens(2, 12)
    family.logits(family(ids)).logsumexp(-1).sum().backward()
    theirs(ids).logits.logsumexp(-1).sum().backward()
    expected = dict(theirs.named_parameters())
    for name, parameter in family.named_parameters():
        relative = (parameter.grad - expected[name].grad).norm() / expected[name].grad.norm()
        assert relative <= 1e-5, name


def test_state_dict_keys_are_transformers(family, reference):
    assert list(family.state_dict()) == list(reference(family).state_dict())


def test_rms_norm_by_hand():
    """The mean square of (3, 4) is 12.5; both are divided by its root."""
    norm = RMSNorm(2, eps=0.0)
    expected = torch.tensor([3 / math.sqrt(12.5), 4 / math.sqrt(12.5)])
    assert torch.allclose(norm(torch.tensor([3.0, 4.0])), expected)


def test_rms_norm_is_computed_in_float32():
    """In bfloat16 the mean square itself would be off by up to half a percent."""
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0)).bfloat16()
    norm = RMSNorm(256, eps=1e-6).bfloat16()
    exact = x.double() / x.double().pow(2).mean(-1, keepdim=True).sqrt()
    # The result's own rounding to 8 bits is all that may be lost.
    assert ((norm(x).double() - exact) / exact).abs().max() <= 2**-8


class TestLearnedPositions:
    """Rows 10 and 22: RoPE hides a wrong offset, so here position t turns by random angles of its own."""

    @pytest.fixture
    def absolute(self, tiny) -> Transformer:
        model = tiny(head_dim=8)
        table = 3 * torch.randn(64, 1, 4, generator=torch.Generator().manual_seed(5))
        model.model.rope = lambda positions: (table[positions].cos(), table[positions].sin())
        return model

    def test_an_offset_matters_here(self, absolute, tokens):
        ids = tokens(1, 6)
        assert not torch.allclose(absolute(ids), absolute(ids, positions=torch.arange(6)[None] + 1), atol=1e-2)

    @pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 4, 2]])
    def test_decoding_equals_reading(self, absolute, tokens, pieces):
        ids = tokens(2, 12)
        cache = KVCache(absolute.config, batch_size=2, capacity=12)
        parts = [absolute(piece, cache=cache) for piece in ids.split(pieces, dim=1)]
        assert torch.allclose(torch.cat(parts, 1), absolute(ids), atol=2e-5)

    def test_left_padded_equals_right_padded_equals_alone(self, absolute, tokens):
        row = tokens(1, 6)
        left, right = (nn.functional.pad(row, sides) for sides in ((3, 0), (0, 3)))
        mask = (torch.arange(9) >= 3)[None]
        hidden = absolute(left, positions=(mask.cumsum(-1) - 1).clamp(min=0), attention_mask=mask)
        assert torch.allclose(hidden[:, 3:], absolute(row), atol=2e-5)
        assert torch.allclose(absolute(right)[:, :6], absolute(row), atol=2e-5)

    def test_sampling_side_by_side_equals_sampling_alone(self, absolute, tokens):
        """The sampler pads on the left and counts on by itself."""
        prompts = [tokens(1, length, seed=length)[0].tolist() for length in (3, 9, 6)]
        together = generate(absolute, prompts, max_new_tokens=6, temperature=0.0)
        for prompt, found in zip(prompts, together, strict=True):
            alone = prompt
            for token in found.token_ids:
                assert absolute.logits(absolute(torch.tensor([alone])))[0, -1].argmax() == token
                alone = [*alone, token]

    def test_packed_documents_count_from_zero(self, absolute, tokens):
        first, second = tokens(1, 7, seed=2), tokens(1, 9, seed=3)
        documents, positions = torch.tensor([[0] * 7 + [1] * 9]), torch.tensor([[*range(7), *range(9)]])
        packed = absolute(torch.cat([first, second], 1), positions=positions, document_ids=documents)
        assert torch.allclose(packed[:, 7:], absolute(second), atol=2e-5)


def test_only_differences_of_positions_matter(tiny, tokens):
    model, ids = tiny(), tokens(2, 10)
    shifted = torch.arange(10)[None] + 37
    assert torch.allclose(model(ids), model(ids, positions=shifted), atol=1e-5)


def test_the_future_does_not_leak(family, tokens):
    ids = tokens(1, 16)
    changed = ids.clone()
    changed[0, 10] = 5
    a, b = family(ids), family(changed)
    assert torch.equal(a[:, :10], b[:, :10])
    assert not torch.allclose(a[:, 10], b[:, 10])


def test_a_sliding_window_bounds_what_is_seen(tiny, tokens):
    """One layer, a window of 4: position 9 sees 6..9."""
    model = tiny(num_hidden_layers=1, sliding_window=4)
    ids = tokens(1, 10)
    for position, seen in [(5, False), (6, True)]:
        changed = ids.clone()
        changed[0, position] = 5
        assert torch.equal(model(ids)[:, 9], model(changed)[:, 9]) is not seen


class TestPacking:
    def test_packed_equals_unpacked(self, family, tokens):
        first, second = tokens(1, 7, seed=2), tokens(1, 9, seed=3)
        packed = torch.cat([first, second], 1)
        documents = torch.tensor([[0] * 7 + [1] * 9])
        positions = torch.tensor([[*range(7), *range(9)]])
        hidden = family(packed, positions=positions, document_ids=documents)
        assert torch.allclose(hidden[:, :7], family(first), atol=2e-5)
        assert torch.allclose(hidden[:, 7:], family(second), atol=2e-5)

    def test_a_changed_document_leaves_the_other_bit_equal(self, family, tokens):
        packed = tokens(1, 16)
        changed = packed.clone()
        changed[0, 3] = 5
        documents = torch.tensor([[0] * 7 + [1] * 9])
        positions = torch.tensor([[*range(7), *range(9)]])
        a, b = (family(ids, positions=positions, document_ids=documents) for ids in (packed, changed))
        assert torch.equal(a[:, 7:], b[:, 7:])
        assert not torch.equal(a[:, :7], b[:, :7])


class TestCache:
    @pytest.mark.parametrize("pieces", [[1] * 12, [5, 1, 4, 2], [11, 1]])
    def test_cached_equals_uncached(self, family, tokens, pieces):
        ids = tokens(2, 12)
        cache = KVCache(family.config, batch_size=2, capacity=12)
        parts = [family(piece, cache=cache) for piece in ids.split(pieces, dim=1)]
        assert torch.allclose(torch.cat(parts, 1), family(ids), atol=2e-5)
        assert cache.length == 12

    def test_left_padded_equals_right_padded_equals_alone(self, family, tokens):
        rows = [tokens(1, length, seed=length)[0] for length in (3, 9, 6)]
        left = torch.stack([torch.cat([torch.zeros(9 - len(r), dtype=torch.long), r]) for r in rows])
        right = torch.stack([torch.cat([r, torch.zeros(9 - len(r), dtype=torch.long)]) for r in rows])
        mask = torch.stack([torch.arange(9) >= 9 - len(r) for r in rows])
        hidden_left = family(left, positions=(mask.cumsum(-1) - 1).clamp(min=0), attention_mask=mask)
        hidden_right = family(right)
        assert hidden_left.isfinite().all()
        for index, row in enumerate(rows):
            alone = family(row[None])[0]
            assert torch.allclose(hidden_left[index, 9 - len(row) :], alone, atol=2e-5)
            assert torch.allclose(hidden_right[index, : len(row)], alone, atol=2e-5)

    def test_the_store_never_moves(self, tiny, tokens):
        model = tiny()
        cache = KVCache(model.config, batch_size=1, capacity=8)
        model(tokens(1, 4), cache=cache)
        before = cache._keys.data_ptr()
        model(tokens(1, 4), cache=cache)
        assert cache._keys.data_ptr() == before
        with pytest.raises(ValueError, match="8 positions"):
            model(tokens(1, 1), cache=cache)


class TestTiedEmbeddings:
    """Row 23."""

    @staticmethod
    def tied(model: Transformer) -> bool:
        return model.lm_head.weight is model.model.embed_tokens.weight

    def test_one_storage_through_to_and_copy(self, tiny):
        model = tiny(tie_word_embeddings=True)
        assert self.tied(model)
        assert self.tied(model.to(torch.bfloat16))
        assert self.tied(copy.deepcopy(model))
        assert self.tied(model.to("meta").to_empty(device="cpu"))
        assert not self.tied(tiny())

    def test_one_storage_after_loading_resuming_and_compiling(self, tiny, tmp_path):
        """A checkpoint has the matrix under both names; filling both must leave one."""
        model = tiny(tie_word_embeddings=True)
        save_model(tmp_path / "model", model)
        assert self.tied(load_model(tmp_path / "model"))
        torch.save(model.state_dict(), tmp_path / "checkpoint.pt")
        resumed = tiny(tie_word_embeddings=True).init_weights(1)
        resumed.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
        assert self.tied(resumed)
        assert torch.equal(resumed.lm_head.weight, model.lm_head.weight)
        resumed.model.compile_layers(backend="eager")
        assert self.tied(resumed)
        assert sum(p.numel() for p in resumed.parameters()) == resumed.config.num_parameters()

    def test_gradient_is_the_sum_of_both_uses(self, tiny, tokens):
        tied = tiny(tie_word_embeddings=True)
        untied = Transformer(ModelConfig(**{**tied.config.__dict__, "tie_word_embeddings": False}))
        untied.load_state_dict(tied.state_dict())
        for model in (tied, untied):
            model.logits(model(tokens(2, 8))).logsumexp(-1).sum().backward()
        both = untied.lm_head.weight.grad + untied.model.embed_tokens.weight.grad
        assert torch.allclose(tied.lm_head.weight.grad, both, rtol=1e-5, atol=1e-6)

    def test_one_parameter(self, tiny):
        assert "lm_head.weight" not in dict(tiny(tie_word_embeddings=True).named_parameters())


class TestInitialWeights:
    def test_a_pure_function_of_shape_and_seed(self, tiny):
        models = [tiny(), tiny(), tiny()]
        before = torch.get_rng_state()
        first, second, other = (m.init_weights(seed).state_dict() for m, seed in zip(models, (7, 7, 8), strict=True))
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
        assert torch.equal(before, torch.get_rng_state())

    @pytest.mark.parametrize("tie", [True, False])
    def test_first_loss_is_that_of_guessing(self, tie):
        config = ModelConfig.from_depth(2, vocab_size=512, context=64, tie_word_embeddings=tie)
        model = Transformer(config).init_weights(0)
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(0, 512, (8, 65), generator=generator)
        with torch.no_grad():
            loss = nn.functional.cross_entropy(model.logits(model(ids[:, :-1])).flatten(0, 1), ids[:, 1:].flatten())
        assert abs(loss.item() - math.log(512)) < 0.1

    def test_the_residual_stream_does_not_grow_with_depth(self):
        def scale(depth: int) -> float:
            config = ModelConfig(
                vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=depth, num_attention_heads=4
            )
            model = Transformer(config).init_weights(0)
            seen: list[float] = []
            model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0].std().item()))
            with torch.no_grad():
                model(torch.arange(64)[None])
            return seen[0]

        assert scale(24) < 1.5 * scale(3) < 0.2


def test_autocast_stays_near_float32(family, tokens):
    ids = tokens(2, 20)
    exact = family.logits(family(ids))
    cache = KVCache(family.config, batch_size=2, capacity=20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        low = family.logits(family(ids))
        cached = [family.logits(family(piece, cache=cache)) for piece in ids.split([12, 8], dim=1)]
    assert low.dtype == torch.float32
    assert cache._keys.dtype == cache._values.dtype == torch.bfloat16
    assert (low - exact).norm() / exact.norm() < 3e-2
    assert (torch.cat(cached, 1) - exact).norm() / exact.norm() < 3e-2
