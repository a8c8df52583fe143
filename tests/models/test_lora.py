"""Adapters against PEFT, to the bit where nothing is computed differently, and what of a network may move."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from trivium.config import ConfigError
from trivium.models.accounting import flops
from trivium.models.config import ModelConfig, ModelError
from trivium.models.generate import generate
from trivium.models.heads import ScalarModel
from trivium.models.hf import save_model
from trivium.models.lora import (
    MATRICES,
    LoraConfig,
    LoraLinear,
    adapt,
    adapter_facts,
    adapters_of,
    adapters_off,
    merged,
    policy_and_reference,
    trained_copy,
    training_flops,
)
from trivium.models.transformer import Transformer

CONFIG = LoraConfig(rank=4, alpha=8.0)


def learned(model, config: LoraConfig = CONFIG, seed: int = 3):
    """Return the model adapted, its B no longer 0, as after some training."""
    adapt(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for adapter in adapters_of(model).values():
            adapter.lora_B.copy_(0.2 * torch.randn(adapter.lora_B.shape, generator=generator))
    return model


def logits_of(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model(ids))


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """Equal to 1e-5 of the largest number: fp32 sums in another order."""
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5 * float(wanted.detach().abs().max()))


def peft_of(model: Transformer, reference, config: LoraConfig = CONFIG):
    """Return PEFT's model with the same weights and the same adapters."""
    plain = merged_base(model)
    theirs = peft.get_peft_model(
        reference(plain),
        peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,
            target_modules=list(MATRICES[config.targets]),
            task_type="CAUSAL_LM",
        ),
    ).eval()
    with torch.no_grad():
        for name, adapter in adapters_of(model).items():
            other = theirs.base_model.model.get_submodule(name)
            other.lora_A["default"].weight.copy_(adapter.lora_A)
            other.lora_B["default"].weight.copy_(adapter.lora_B)
    return theirs


def merged_base(model: Transformer) -> Transformer:
    """Return a plain network with an adapted one's frozen weights."""
    plain = Transformer(model.config)
    plain.load_state_dict({n: t for n, t in model.state_dict().items() if "lora_" not in n})
    return plain.eval()


def test_an_adapted_network_starts_as_the_network_and_is_it_when_switched_off(family, tokens):
    """B = 0 adds 0 and nothing else; off, the adapters take no part; both to the bit, whatever the targets."""
    ids = tokens(2, 12)
    before = logits_of(family, ids)
    for targets, number in (("attention", 4), ("mlp", 3), ("both", 7)):
        model = adapt(copy.deepcopy(family), LoraConfig(rank=2, targets=targets))
        assert len(adapters_of(model)) == number * model.config.num_hidden_layers
        assert torch.equal(logits_of(model, ids), before)
    model = learned(copy.deepcopy(family))
    assert (logits_of(model, ids) - before).abs().max() > 0.1
    with adapters_off(model):
        assert torch.equal(logits_of(model, ids), before)
    assert not torch.equal(logits_of(model, ids), before)


def test_forward_pass_and_gradients_are_peft_s(family, tokens, reference):
    """Logits within 1e-5 of their size, and so the gradient of every A and B; nothing else has one."""
    model = learned(family)
    theirs = peft_of(model, reference)
    ids = tokens(2, 14)
    ours_out, theirs_out = logits_of(model, ids), theirs(input_ids=ids).logits
    close(ours_out, theirs_out)
    for logits in (ours_out, theirs_out):
        cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {f"{name}.{part}" for name in adapters_of(model) for part in ("lora_A", "lora_B")}
    for name, adapter in adapters_of(model).items():
        other = theirs.base_model.model.get_submodule(name)
        for ours, their in (
            (adapter.lora_A, other.lora_A["default"].weight),
            (adapter.lora_B, other.lora_B["default"].weight),
        ):
            close(ours.grad, their.grad)


def test_merged_is_the_adapted_network(family, tokens, reference):
    """Merged weights are PEFT's to 2.5e-7 (an fp32 rounding of values near 1), and the frozen ones have not moved."""
    model = learned(family)
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    theirs = peft_of(model, reference).merge_and_unload().state_dict()
    plain = merged(model)
    assert set(plain.state_dict()) == set(theirs)
    for name, tensor in plain.state_dict().items():
        torch.testing.assert_close(tensor, theirs[name], rtol=2.5e-7, atol=2.5e-7)
    ids = tokens(2, 12)
    close(logits_of(plain, ids), logits_of(model, ids))
    assert all(torch.equal(tensor, base[name]) for name, tensor in model.state_dict().items())
    assert merged(plain) is plain


def test_merging_in_fp64_leaves_nothing_but_rounding(tiny, tokens):
    """The same identity where rounding is 1e-16: no term is forgotten or scaled otherwise."""
    model = learned(tiny(attention_bias=True, tie_word_embeddings=True)).double()
    ids = tokens(2, 12)
    assert (model.model(ids) - merged(model).model(ids)).abs().max() < 1e-12


def test_a_hand_worked_adapter():
    """W = [[1, 0]], A = [[1, 2]], B = [[3]], alpha 4, rank 1, x = (1, 1): 1 + 4 * 3 * 3 = 37; merged [[13, 24]]."""
    base = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        base.weight.copy_(torch.tensor([[1.0, 0.0]]))
    adapter = LoraLinear(base, rank=1, scale=4.0)
    with torch.no_grad():
        adapter.lora_A.copy_(torch.tensor([[1.0, 2.0]]))
        adapter.lora_B.copy_(torch.tensor([[3.0]]))
    assert adapter(torch.ones(1, 2)).item() == 37.0
    assert adapter.merged().tolist() == [[13.0, 24.0]]


def test_only_adapters_are_trained_and_tied_embeddings_stay_one(tiny, tokens):
    """Ten steps of AdamW: every frozen tensor is what it was to the bit, every A and B has moved."""
    model = adapt(tiny(tie_word_embeddings=True, attention_bias=True), CONFIG)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids = tokens(4, 12)
    for _ in range(10):
        optimizer.zero_grad()
        cross_entropy(logits_of(model, ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != name.endswith(("lora_A", "lora_B")), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    plain = merged(model)
    assert plain.lm_head.weight is plain.model.embed_tokens.weight
    assert torch.equal(plain.lm_head.weight, before["model.embed_tokens.weight"])
    assert adapter_facts(model)["lora"]["num_trainable"] == sum(
        p.numel() for p in model.parameters() if p.requires_grad
    )


def test_a_is_drawn_as_peft_draws_it_and_from_the_seed(tiny):
    """Uniform in +-1 / sqrt(inputs): the deviation is bound / sqrt(3); another seed is another A, the same the same."""
    shape = {"hidden_size": 64, "intermediate_size": 400, "num_hidden_layers": 2}
    first, second, other = (adapt(tiny(**shape), LoraConfig(rank=32), seed=seed) for seed in (1, 1, 2))
    for name, adapter in adapters_of(first).items():
        bound = adapter.weight.shape[1] ** -0.5
        assert adapter.lora_A.abs().max() <= bound
        # 2,048 numbers or more: the deviation of a uniform sample is known to 1%, and 5% is five times that.
        assert adapter.lora_A.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
        assert torch.equal(adapter.lora_A, adapters_of(second)[name].lora_A)
        assert not torch.equal(adapter.lora_A, adapters_of(other)[name].lora_A)
        assert not adapter.lora_B.any()
    theirs = peft.tuners.lora.Linear(torch.nn.Linear(400, 64), "x", peft.LoraConfig(r=32), r=32).lora_A["x"].weight
    assert theirs.abs().max() <= 400**-0.5
    assert theirs.std().item() == pytest.approx(400**-0.5 / 3**0.5, rel=0.05)


def test_sampling_with_a_cache_is_the_merged_network_s(tiny):
    """Greedy completions are those of the merged network, with the same log-probabilities to fp32's rounding."""
    model = learned(tiny(qk_norm=True))
    prompts = [[9, 10, 11], [12], [13, 14, 15, 16]]
    arguments = {"max_new_tokens": 8, "temperature": 0.0, "stop_ids": frozenset({2})}
    for ours, plain in zip(
        generate(model, prompts, **arguments), generate(merged(model), prompts, **arguments), strict=True
    ):
        assert ours.token_ids == plain.token_ids
        assert ours.logprobs == pytest.approx(plain.logprobs, abs=2e-5)


def test_the_reference_of_an_adapted_policy_is_the_folder_and_no_second_copy(tiny, tokens, tmp_path):
    """One network: off, it computes the folder's logits to the bit; without adapters there are two."""
    model = tiny()
    save_model(tmp_path, model)
    ids = tokens(2, 10)
    policy, reference = policy_and_reference(tmp_path, CONFIG, seed=5)
    assert reference is policy
    learned_b = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for adapter in adapters_of(policy).values():
            adapter.lora_B.copy_(torch.randn(adapter.lora_B.shape, generator=learned_b))
    with adapters_off(reference):
        assert torch.equal(logits_of(reference, ids), logits_of(model, ids))
    policy, reference = policy_and_reference(tmp_path, LoraConfig())
    assert reference is not policy
    assert all(p.requires_grad for p in policy.parameters())
    assert not any(p.requires_grad for p in reference.parameters())
    assert not adapters_of(policy)


def test_an_adapted_copy_of_a_scalar_model_shares_what_is_frozen(tiny):
    """The same storage below, a head of its own on top; without adapters everything is a copy and everything trains."""
    frozen = ScalarModel.from_transformer(tiny(), seed=1).requires_grad_(False)
    value = trained_copy(frozen, CONFIG)
    own = {name for name, p in value.named_parameters() if p.requires_grad}
    assert own == {"score.weight"} | {f"{n}.{part}" for n in adapters_of(value) for part in ("lora_A", "lora_B")}
    theirs = dict(frozen.named_parameters())
    shared = {
        name for name, p in value.named_parameters() if p.data_ptr() == theirs.get(name, p.new_zeros(1)).data_ptr()
    }
    assert shared == theirs.keys() - {"score.weight"}
    assert not adapters_of(frozen)
    assert not any(p.requires_grad for p in frozen.parameters())
    whole = trained_copy(frozen, LoraConfig())
    assert all(p.requires_grad for p in whole.parameters())
    assert not any(p.data_ptr() == theirs[name].data_ptr() for name, p in whole.named_parameters())


@pytest.mark.parametrize("targets", ["attention", "mlp", "both"])
@pytest.mark.parametrize("changes", [{}, {"attention_bias": True}, {"num_key_value_heads": 4, "head_dim": 16}])
def test_training_flops_are_what_torch_counts(targets, changes):
    """Exactly, less what the lowest block is spared; the scores, which torch does not count on a CPU, left out."""
    config = ModelConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        **{"num_key_value_heads": 2, "max_position_embeddings": 64} | changes,
    )  # fmt: skip
    lora = LoraConfig(rank=3, targets=targets)
    model = adapt(Transformer(config).init_weights(0), lora)
    length = 16
    ids = torch.randint(0, 64, (1, length), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        logits_of(model, ids).sum().backward()
    width, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_attention_heads * config.head_size, config.kv_heads * config.head_size
    products = training_flops(config, length, lora) - 3 * flops(config, length)["attention_scores"]
    # The gradient of the block's input: through q, k, v and their A.
    spared = 2 * width * (queries + 2 * keys + 3 * lora.rank)
    if targets == "mlp":  # that of q, k, v, and o's, and of the MLP's input: through gate, up and their A
        spared = 2 * width * (queries + 2 * keys) + 2 * queries * width + 2 * width * (2 * inner + 2 * lora.rank)
    assert counter.get_total_flops() == length * (products - spared)
    assert training_flops(config, length, LoraConfig()) == 3 * config.flops_per_token(length)


def test_what_cannot_be_adapted_is_one_sentence(tiny):
    """A rank above the smaller side of a matrix, an unknown target, a negative rank, adapters on adapters."""
    with pytest.raises(ConfigError, match=r"lora\.rank = 17: model\.layers\.0\.self_attn\.k_proj is 16 x 32, so 16 is"):
        adapt(tiny(), LoraConfig(rank=17))
    adapt(tiny(), LoraConfig(rank=17, targets="mlp"))
    with pytest.raises(ConfigError, match="targets = 'atention': must be one of attention, mlp, both; did you mean"):
        LoraConfig(rank=4, targets="atention")
    with pytest.raises(ConfigError, match="rank = -1: must be at least 0"):
        LoraConfig(rank=-1)
    with pytest.raises(ConfigError, match="alpha = 0"):
        LoraConfig(rank=1, alpha=0.0)
    with pytest.raises(ModelError, match="has adapters already; merge them first"):
        adapt(adapt(tiny(), CONFIG), CONFIG)


def test_rank_0_is_the_network_untouched(tiny):
    """The very same object, everything trainable, no adapter anywhere."""
    model = tiny()
    assert adapt(model, LoraConfig()) is model
    assert all(p.requires_grad for p in model.parameters())
    assert not adapters_of(model)
    assert adapter_facts(model) == {}
