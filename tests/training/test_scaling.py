"""The dial's rules: the published fits by hand, and what a recipe sets itself is kept."""

from __future__ import annotations

import pytest

from trivium.models.config import ModelConfig
from trivium.models.transformer import Transformer
from trivium.training.scaling import (
    MAX_LR,
    MAX_WEIGHT_DECAY,
    budget_of,
    matrix_parameters,
    optimal_batch_tokens,
    optimal_lr,
    optimal_weight_decay,
    shape_of,
)


def network(hidden_size: int = 128, layers: int = 2, **changes: object) -> ModelConfig:
    """Return a network over 512 tokens."""
    fields = {
        "vocab_size": 512,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "tie_word_embeddings": True,
    }
    return ModelConfig(**(fields | changes))


def test_shapes_by_hand():
    assert vars_of(shape_of(4)) == (256, 4, 4, 2)
    assert vars_of(shape_of(3)) == (192, 3, 3, 3)
    assert vars_of(shape_of(12)) == (768, 12, 12, 6)
    assert vars_of(shape_of(2, hidden_size=96)) == (96, 2, 2, 1)
    assert vars_of(shape_of(2, num_heads=8)) == (128, 2, 8, 4)


def vars_of(shape: object) -> tuple[int, ...]:
    return (shape.hidden_size, shape.num_layers, shape.num_heads, shape.num_kv_heads)


def test_every_even_width_gets_heads_that_a_transformer_can_have():
    """ModelConfig refuses heads that do not divide the width, or whose size is odd."""
    for width in range(2, 700, 2):
        shape = shape_of(1, hidden_size=width)
        network(width, 1, num_attention_heads=shape.num_heads, num_key_value_heads=shape.num_kv_heads)


def test_the_published_fits_by_hand():
    """Step Law at N = 10^9 and D = 10^11: 10^(9 * -0.713 + 11 * 0.307) = 10^-3.04, and 10^(11 * 0.571) = 10^6.281."""
    assert optimal_lr(1e9, 1e11) == pytest.approx(1.79 * 10**-3.04)
    assert optimal_batch_tokens(1e11) == pytest.approx(0.58 * 10**6.281)
    # tau at 20 tokens a parameter is 1.084 * 20^-0.527 = 0.2236 of the run: 1 / (0.01 * 0.2236 * 10,000) = 0.0447.
    assert optimal_weight_decay(1e-2, 10_000, 20.0) == pytest.approx(0.0447, abs=1e-4)
    assert optimal_lr(1e3, 1e9) == MAX_LR
    assert optimal_weight_decay(1e-3, 1, 1.0) == MAX_WEIGHT_DECAY


def test_the_budget_is_twenty_tokens_a_parameter_in_whole_steps():
    model = network()
    budget = budget_of(model, context=64)
    assert budget.tokens == budget.steps * budget.batch_size * 64
    assert 0 <= budget.tokens - 20 * model.num_parameters() < budget.batch_size * 64
    assert budget.batch_size * 64 == pytest.approx(optimal_batch_tokens(20 * model.num_parameters()), abs=32)
    assert budget.lr == pytest.approx(optimal_lr(matrix_parameters(model), budget.tokens), rel=0.05)
    long = budget_of(model, 64, 80.0)
    assert long.tokens == pytest.approx(4 * budget.tokens, rel=0.01)
    assert long.batch_size > budget.batch_size


def test_a_short_run_has_small_batches_rather_than_few_steps():
    """Half a million tokens: the fit's 1,040 a step would be 480 steps, so it is 640 a step: ten rows, 781 steps."""
    model = network()
    budget = budget_of(model, 64, 5e5 / model.num_parameters())
    assert (budget.batch_size, budget.steps) == (10, 782)
    assert budget_of(model, 64).batch_size == round(optimal_batch_tokens(20 * model.num_parameters()) / 64)


def test_what_is_given_is_kept_and_the_rest_follows_from_it():
    model = network()
    free = budget_of(model, 64)
    rows = budget_of(model, 64, batch_size=3)
    assert rows.batch_size == 3
    assert rows.tokens == pytest.approx(free.tokens, rel=0.01), "the tokens are the same, in more steps"
    short = budget_of(model, 64, steps=10)
    assert (short.steps, short.tokens) == (10, 10 * short.batch_size * 64)
    assert short.lr < free.lr, "fewer tokens ask for a lower rate"
    assert budget_of(model, 64, lr=0.5, weight_decay=0.0).lr == 0.5
    assert budget_of(model, 64, weight_decay=0.0).weight_decay == 0.0


def test_a_wider_network_learns_slower_and_reads_more():
    """At 20 tokens a parameter the rate falls as N^(0.307 - 0.713): a 16 times larger one gets a third."""
    budgets = [budget_of(network(width, layers), 64) for width, layers in ((512, 4), (1024, 16))]
    sizes = [matrix_parameters(network(width, layers)) for width, layers in ((512, 4), (1024, 16))]
    expected = (sizes[1] / sizes[0]) ** -0.713 * (budgets[1].tokens / budgets[0].tokens) ** 0.307
    assert budgets[1].lr / budgets[0].lr == pytest.approx(expected, rel=0.1)  # both are rounded to two digits
    assert budgets[1].batch_size > budgets[0].batch_size


@pytest.mark.parametrize("tied", [True, False])
def test_matrix_parameters_are_those_of_the_layers(tied):
    model = Transformer(network(tie_word_embeddings=tied))
    inside = sum(p.numel() for name, p in model.named_parameters() if ".layers." in name)
    assert matrix_parameters(model.config) == inside
