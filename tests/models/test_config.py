import dataclasses

import pytest
import transformers
from torch.utils.flop_counter import FlopCounterMode

from trivium.config import UserError
from trivium.models.config import ModelConfig, ModelError
from trivium.models.families import read_config, write_config
from trivium.models.transformer import Transformer

SMALL = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


MISTRAL = {"model_type": "mistral", "num_key_value_heads": 4}


def test_config_json_and_back_is_the_same_shape(family):
    config = family.config
    explicit = dataclasses.replace(config, num_key_value_heads=config.kv_heads, head_dim=config.head_size)
    assert read_config(write_config(config)) == explicit


def test_parameter_count_is_the_count_of_the_parameters(family):
    assert family.config.num_parameters() == sum(p.numel() for p in family.parameters())


def test_config_json_carries_both_generations_of_names():
    written = write_config(ModelConfig(**SMALL, rope_theta=7.0), dtype="bfloat16")
    assert written["rope_theta"] == written["rope_parameters"]["rope_theta"] == 7.0
    assert written["dtype"] == written["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 123.0},
        {"rope_parameters": {"rope_theta": 123.0, "rope_type": "default"}},
        {"rope_theta": 123.0, "rope_scaling": None, "rope_parameters": {"rope_theta": 123.0}},
    ],
)
def test_either_generation_of_rope_names_is_read(rope):
    config = read_config({**SMALL, "model_type": "llama", **rope})
    assert (config.rope_theta, config.rope_scaling) == (123.0, None)


def test_old_type_key_of_rope_scaling_is_read():
    config = read_config({**SMALL, "model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert config.rope_scaling == {"rope_type": "linear", "factor": 2.0}


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mistral", "olmo2"])
def test_absent_keys_mean_what_transformers_takes_them_to_mean(family):
    """The defaults differ between families: Qwen3's heads are 128 wide, Mistral has a window of 4,096."""
    shape = {**SMALL, "num_attention_heads": 32, "hidden_size": 64}
    ours = read_config({**shape, "model_type": family})
    theirs = transformers.CONFIG_MAPPING[family](**shape)
    assert ours.pad_token_id == theirs.pad_token_id
    for name in (
        "max_position_embeddings",
        "rms_norm_eps",
        "tie_word_embeddings",
        "initializer_range",
        "hidden_act",
    ):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert ours.kv_heads == theirs.num_key_value_heads
    assert ours.head_size == (getattr(theirs, "head_dim", None) or 64 // 32)
    assert ours.sliding_window == getattr(theirs, "sliding_window", None)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    assert (ours.bos_token_id, ours.eos_token_id) == (theirs.bos_token_id, theirs.eos_token_id)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "gpt2"}, "gpt2"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "yarn.*factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0]}}, "longrope.*cached"),
        ({"rope_scaling": {"rope_type": "spiral", "factor": 2.0}}, "spiral.*computes default, linear"),
        ({"rope_scaling": {"rope_type": "default", "mrope_section": [1, 1, 2]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "between layers.*full_attention"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic.*cached"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"attention_bias": True}, "attention_bias of llama"),
        ({"model_type": "olmo2", "attention_bias": True}, "attention_bias of olmo2"),
        ({"model_type": "olmo2", "head_dim": 8}, "head_dim is 8; OLMo 2"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping = 50.0"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"attention_sinks": True}, "attention_sinks"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 5}, "head_dim"),
        ({"hidden_size": 18}, "hidden_size"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
        ({"model_type": "qwen2", "layer_types": ["full_attention"]}, "layer_types names 1 layers"),
        ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "there is no window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "there is no window"),
        ({**MISTRAL, "layer_types": ["full_attention", "sliding_attention"]}, "differ exist in Qwen2"),
        ({**MISTRAL, "layer_types": ["full_attention"] * 2}, "turns its window off"),
    ],
)
def test_what_the_network_cannot_compute_is_refused_by_name(changes, named):
    with pytest.raises(ValueError, match=named) as caught:
        read_config({**SMALL, "model_type": "llama", **changes})
    assert isinstance(caught.value, ModelError)
    assert isinstance(caught.value, UserError)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"qk_norm": True, "attention_bias": True}, "qk_norm and attention_bias exclude each other"),
        ({"post_norm": True, "qk_norm": True}, "post_norm and qk_norm"),
        ({"post_norm": True, "sliding_window": 4}, "post_norm .* sliding_window"),
        ({"qk_norm": True, "layer_types": ("full_attention",) * 2}, "only with a sliding_window"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 1}}, "linear' has no beta_fast"),
    ],
)
def test_shapes_without_a_published_layout_are_refused(changes, named):
    with pytest.raises(ModelError, match=named):
        ModelConfig(**{**SMALL, **changes})


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({}, (None, None)),
        ({"use_sliding_window": True, "sliding_window": 4}, (None, None)),  # max_window_layers is 28 by default
        ({"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}, (None, 4)),
        ({"use_sliding_window": True, "max_window_layers": 0}, (4096, 4096)),
        ({"sliding_window": 4, "max_window_layers": 0}, (None, None)),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 4,
                "layer_types": ["sliding_attention", "full_attention"],
            },
            (4, None),
        ),
    ],
)
def test_qwens_windows_are_read_as_transformers_reads_them(changes, windows):
    config = {**SMALL, "num_key_value_heads": 4, "model_type": "qwen2", **changes}
    theirs = transformers.Qwen2Config(**config)
    expected = tuple(theirs.sliding_window if kind == "sliding_attention" else None for kind in theirs.layer_types)
    ours = read_config(config)
    assert ours.windows == expected == windows
    assert read_config(write_config(ours)).windows == windows


def test_the_original_context_is_found_where_transformers_finds_it():
    """Beside the scaling before inside it, and the context itself where neither is given."""
    yarn = {"rope_type": "yarn", "factor": 2.0}
    for changes, expected in [
        ({"rope_scaling": {**yarn, "original_max_position_embeddings": 32}}, 32),
        ({"rope_scaling": yarn, "original_max_position_embeddings": 64}, 64),
        ({"rope_scaling": yarn, "max_position_embeddings": 128}, 128),
    ]:
        config = {**SMALL, "model_type": "llama", **changes}
        ours = read_config(config)
        theirs = transformers.LlamaConfig(**{**config, "rope_scaling": dict(config["rope_scaling"])})
        theirs.standardize_rope_params()  # once more, as its model does: only now is the key beside the scaling seen
        assert ours.rope_scaling["original_max_position_embeddings"] == expected
        assert theirs.rope_parameters["original_max_position_embeddings"] == expected


def test_missing_field_is_named():
    with pytest.raises(ModelError, match="intermediate_size"):
        read_config({k: v for k, v in SMALL.items() if k != "intermediate_size"} | {"model_type": "llama"})


def test_depth_is_one_dial():
    config = ModelConfig.from_depth(4, vocab_size=4096, context=256)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads, config.head_size) == (
        256,
        4,
        4,
        64,
    )
    assert config.max_position_embeddings == 256
    assert config.model_type == "qwen3"
    sizes = [ModelConfig.from_depth(d, vocab_size=4096, context=256).num_parameters() / 1e6 for d in (2, 4, 6, 8)]
    assert [round(size, 1) for size in sizes] == DOCUMENTED_MILLIONS
    assert ModelConfig.from_depth(3, 100, 64, qk_norm=False).model_type == "llama"


DOCUMENTED_MILLIONS = [0.9, 4.0, 11.3, 27.8]


def test_flops_by_hand():
    """One layer, width 4, one head of 4, MLP 8, 10 tokens of vocabulary, a row of 3 tokens.

    Matrices: q, k, v, o are 4*16 = 64, the MLP 3*32 = 96, the output 40: 200 multiply-adds = 400 FLOPs. The three
    positions see 1, 2 and 3: on average 2, each for 4 multiply-adds of scores and 4 of mixing: 2 * 8 * 2 = 32 FLOPs.
    """
    config = ModelConfig(vocab_size=10, hidden_size=4, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    assert config.flops_per_token(3) == 432.0
    # A window of 2: they see 1, 2 and 2.
    assert dataclasses.replace(config, sliding_window=2).flops_per_token(3) == pytest.approx(400 + 16 * 5 / 3)


def test_flops_agree_with_torchs_own_counter(tiny, tokens):
    model = tiny(num_key_value_heads=4)
    row = tokens(1, 20)
    with FlopCounterMode(display=False) as counter:
        model.logits(model(row))
    config = model.config
    # torch does not count the CPU's attention kernel; the test by hand does.
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_size * 21 / 2
    assert counter.get_total_flops() / 20 == pytest.approx(config.flops_per_token(20) - attention)


def test_a_model_without_layers_is_possible():
    assert Transformer(ModelConfig(**{**SMALL, "num_hidden_layers": 0})).config.num_parameters() == 2 * 50 * 16 + 16
