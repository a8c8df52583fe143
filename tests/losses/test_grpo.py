from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from trivium.losses.grpo import group_advantages, grpo


def test_advantages_by_hand():
    rewards, groups = torch.tensor([1.0, 0.0, 0.0, 1.0]), torch.zeros(4, dtype=torch.long)
    assert group_advantages(rewards, groups, "none").tolist() == [0.5, -0.5, -0.5, 0.5]
    expected = 0.5 / (0.57735 + 1e-4)
    assert group_advantages(rewards, groups).tolist() == pytest.approx(
        [expected, -expected, -expected, expected], abs=1e-5
    )


def test_each_group_stands_alone_in_any_row_order_and_sums_to_zero():
    generator = torch.Generator().manual_seed(0)
    rewards, groups = torch.randn(12, generator=generator), torch.tensor([5, 5, 5, 5, 0, 0, 0, 0, 2, 2, 2, 2])
    shuffle = torch.randperm(12, generator=generator)
    for scale in ("std", "none"):
        advantages = group_advantages(rewards, groups, scale)
        assert torch.allclose(
            group_advantages(rewards[shuffle], groups[shuffle], scale), advantages[shuffle], atol=1e-5
        )
        assert advantages.reshape(3, 4).sum(1).abs().max() < 1e-5
        assert torch.allclose(group_advantages(rewards[:4], groups[:4], scale), advantages[:4], atol=1e-6)


def test_equal_rewards_and_groups_of_one_teach_exactly_nothing():
    for value in (0.1, 1 / 3, 0.7, -12.3):
        rewards = torch.full((7,), value)
        assert (group_advantages(rewards, torch.zeros(7, dtype=torch.long)) == 0).all()
    assert (group_advantages(torch.tensor([3.0, 5.0]), torch.tensor([0, 1])) == 0).all()
    leaf = torch.full((7, 1), -1.0, requires_grad=True)
    advantages = group_advantages(torch.full((7,), 0.1), torch.zeros(7, dtype=torch.long)).unsqueeze(1)
    grpo(leaf, leaf.detach(), leaf.detach(), advantages, 0.2, 0.0).sum().backward()
    assert (leaf.grad == 0).all()


def test_scaling_rewards_scales_the_unscaled_advantages_only():
    rewards, groups = torch.tensor([1.0, 2.0, 5.0]), torch.zeros(3, dtype=torch.long)
    assert torch.allclose(
        group_advantages(10 * rewards, groups, "none"), 10 * group_advantages(rewards, groups, "none")
    )
    assert torch.allclose(group_advantages(10 * rewards, groups), group_advantages(rewards, groups), atol=1e-4)


def _trl(loss_type: str, logps, old, ref, advantages, mask, beta: float, correct: bool):
    """TRL's own loss on given per-token log-probabilities."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer").GRPOTrainer
    same = SimpleNamespace(
        gather=lambda x: x, reduce=lambda x, reduction: x, device="cpu", num_processes=1, sync_gradients=True
    )
    holder = SimpleNamespace(
        model=SimpleNamespace(training=True), aux_loss_enabled=False, top_entropy_quantile=1.0, loss_type=loss_type,
        off_policy_mask_threshold=None, importance_sampling_level="token", beta=beta, epsilon_low=0.2, epsilon_high=0.2,
        use_vllm=False, vllm_importance_sampling_correction=False, current_gradient_accumulation_steps=1,
        max_completion_length=mask.shape[1], _entropy_bonus_enabled=False, accelerator=same,
        args=SimpleNamespace(use_bias_correction_kl=correct, delta=None, steps_per_generation=1),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, torch.zeros_like(logps), None),
    )  # fmt: skip
    ids = torch.zeros_like(mask, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": mask.long(),
        "advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": ref,
        "num_items_in_batch": mask.sum(),
    }  # fmt: skip
    return trainer._compute_loss(holder, None, inputs)


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("correct", [True, False])
def test_same_as_trl_in_value_and_gradient(loss_type, correct):
    generator = torch.Generator().manual_seed(11)
    rows, length, beta = 6, 8, 0.07
    logps = -torch.rand(rows, length, generator=generator) * 2
    old, ref = (logps + 0.3 * torch.randn(rows, length, generator=generator) for _ in range(2))
    mask = torch.arange(length) < torch.tensor([8, 3, 5, 1, 7, 2]).unsqueeze(1)
    advantages = group_advantages(torch.randn(rows, generator=generator), torch.tensor([0, 0, 0, 1, 1, 1]))
    mine, theirs = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    per_token = grpo(mine, old, ref, advantages.unsqueeze(1).expand(rows, length), 0.2, beta, mask, kl_ratio=correct)
    loss = {
        "grpo": (per_token.sum(1) / mask.sum(1)).mean(),
        "bnpo": per_token.sum() / mask.sum(),
        "dr_grpo": per_token.sum() / (rows * length),
        "dapo": per_token.sum() / mask.sum(),
    }[loss_type]
    reference = _trl(loss_type, theirs, old, ref, advantages, mask, beta, correct)
    loss.backward()
    reference.backward()
    assert loss.item() == pytest.approx(reference.item(), abs=2e-6)
    assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)
