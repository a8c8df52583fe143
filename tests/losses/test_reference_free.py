import math
import warnings
from types import SimpleNamespace

import pytest
import torch

from trivium.losses.dpo import dpo
from trivium.losses.reference_free import orpo, simpo


def test_simpo_by_hand():
    leads = torch.tensor([0.0, 0.5, 1.0])
    loss, win, lose = simpo(leads - 1, torch.full((3,), -1.0), beta=2.0, gamma=1.0)
    # -log sigmoid of -1, 0 and 1
    assert loss.tolist() == pytest.approx([1.313262, 0.693147, 0.313262], abs=1e-6)
    assert win.tolist() == [-2.0, -1.0, 0.0] and lose.tolist() == [-2.0] * 3


def test_orpo_by_hand():
    half, third = torch.tensor([math.log(1 / 2)]), torch.tensor([math.log(1 / 3)])
    loss, win, lose = orpo(half, third, beta=1.0)
    # odds 1 and 1/2, so sigmoid(ln 2) = 2/3
    assert loss.item() == pytest.approx(math.log(2) + math.log(3 / 2), abs=1e-6)
    assert (win.item(), lose.item()) == pytest.approx((-math.log(2), -math.log(3)), abs=1e-6)
    # equal sides: the odds ratio says nothing and costs ln 2, the likelihood goes on being learned
    assert orpo(half, half, beta=0.1)[0].item() == pytest.approx(math.log(2) + 0.1 * math.log(2), abs=1e-6)


def test_simpo_is_dpo_of_means_without_reference_and_with_a_target():
    generator = torch.Generator().manual_seed(1)
    chosen, rejected = -torch.rand(2, 5, generator=generator)
    zero = torch.zeros(5)
    assert torch.equal(simpo(chosen, rejected, 2.0, 0.0)[0], dpo(chosen, rejected, zero, zero, 2.0)[0])
    # its reference point is a constant: a reference that ranks the rejected ahead by gamma / beta
    assert torch.allclose(simpo(chosen, rejected, 2.0, 0.7)[0], dpo(chosen, rejected, zero + 0.35, zero, 2.0)[0])


def test_swapping_negates_the_margin_of_simpo_about_its_target():
    chosen, rejected = torch.tensor([-0.3]), torch.tensor([-0.9])
    one, other = (simpo(*pair, 2.0, 0.0)[0] for pair in ((chosen, rejected), (rejected, chosen)))
    assert (other - one).item() == pytest.approx(2.0 * 0.6, abs=1e-6)  # softplus(m) - softplus(-m) = m


def test_orpo_pushes_harder_the_more_the_rejected_is_believed_and_survives_certainty():
    """The gradient on the rejected is beta (1 - sigmoid(lead)) / (1 - p), by the odds' derivative."""
    chosen, rejected = torch.tensor([-2.0, -2.0]), torch.tensor([-3.0, -0.1], requires_grad=True)
    orpo(chosen, rejected, 0.5)[0].sum().backward()
    p, q = torch.exp(torch.tensor(-2.0)), torch.exp(rejected.detach())
    lead = torch.log(p / (1 - p)) - torch.log(q / (1 - q))
    assert torch.allclose(rejected.grad, 0.5 * torch.sigmoid(-lead) / (1 - q), rtol=1e-5)
    certain = torch.zeros(1, requires_grad=True)  # probability 1 to the last bit: odds would be infinite
    loss = orpo(certain, torch.tensor([-1.0]), 0.5)[0]
    loss.sum().backward()
    assert math.isfinite(loss.item()) and torch.isfinite(certain.grad).all()


def test_gradients_reach_both_sides_and_rewards_are_detached():
    for compute in (lambda a, b: simpo(a, b, 2.0, 0.5), lambda a, b: orpo(a, b, 0.3)):
        chosen, rejected = (torch.full((2,), value, requires_grad=True) for value in (-0.5, -0.7))
        loss, win, lose = compute(chosen, rejected)
        loss.sum().backward()
        assert (chosen.grad < 0).all() and (rejected.grad > 0).all()
        assert not win.requires_grad and not lose.requires_grad


def test_nonsense_is_refused():
    one = -torch.ones(1)
    with pytest.raises(ValueError, match="gamma"):
        simpo(one, one, 1.0, -0.1)
    for compute in (lambda: simpo(one, one, 0.0, 0.1), lambda: orpo(one, one, -1.0)):
        with pytest.raises(ValueError, match="beta"):
            compute()


def _trl(module: str):
    """Return one of TRL's experimental modules; that they are experimental, they say with a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pytest.importorskip(f"trl.experimental.{module}")


def _means() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return tuple((-3 * torch.rand(2, 64, generator=generator)).unbind())


@pytest.mark.parametrize(("beta", "gamma"), [(2.0, 0.5), (0.1, 0.0), (10.0, 3.0)])
def test_simpo_is_trls(beta, gamma):
    chosen, rejected = _means()
    holder = SimpleNamespace(
        alpha=0.0, beta=beta, loss_type="simpo", simpo_gamma=gamma, label_smoothing=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )  # fmt: skip
    theirs = _trl("cpo").CPOTrainer.cpo_loss(holder, chosen, rejected)
    for mine, other in zip(simpo(chosen, rejected, beta, gamma), theirs, strict=True):
        assert torch.allclose(mine, other, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_orpo_is_trls_with_the_likelihood_beside_it(beta):
    """In value and gradient; TRL's likelihood also counts the prompt, so it is written out here."""
    mine, theirs = ([x.clone().requires_grad_() for x in _means()] for _ in range(2))
    holder = SimpleNamespace(beta=beta, accelerator=SimpleNamespace(device="cpu"))
    odds, win, lose, _, _ = _trl("orpo").ORPOTrainer.odds_ratio_loss(holder, *theirs)
    loss, good, bad = orpo(*mine, beta)
    reference = -theirs[0] - odds
    loss.sum().backward()
    reference.sum().backward()
    assert torch.allclose(loss, reference, atol=2e-6)
    assert torch.equal(good, win) and torch.equal(bad, lose)
    for a, b in zip(mine, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=2e-6)
