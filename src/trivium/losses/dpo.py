"""Direct preference losses: the policy is its own reward model.

Every loss takes four log-probabilities per pair (policy and reference, chosen and rejected), each [P], and returns the
loss [P] and the implicit rewards `beta * (log pi - log ref)` of both sides [P], detached, for the reward curves. With
`h = (log pi_w - log ref_w) - (log pi_l - log ref_l)`, the losses differ only in what they do to `h`.

`dpo`, `robust_dpo` and `hinge` take log-probabilities **summed** over the completion; `ipo` takes their **mean** per
token, because its target margin is a fixed number that long completions would overshoot. Given means, the first three
are length-normalised (Lambert et al. 2024, Tülu 3, arXiv 2411.15124), with a beta some tens of times larger.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

Triple = tuple[Tensor, Tensor, Tensor]


def dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Triple:
    """Return DPO's loss and both implicit rewards, each fp32 [P].

    `-log sigmoid(beta h)` (Rafailov et al. 2023, eq. 7). With `label_smoothing` e it is conservative DPO (Mitchell
    2023): `-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)`, the likelihood when a share e of the labels is
    flipped; its optimum is the finite margin `logit(1 - e) / beta`. Raises ValueError unless 0 <= e < 0.5.

    Worked, beta 0.5: h = 0, 2, 4 give 0.6931, 0.3133, 0.1269.
    """
    _check_smoothing(label_smoothing)
    win, lose = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    margin = win - lose
    loss = -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)
    return loss, win.detach(), lose.detach()


def robust_dpo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Triple:
    """Return robust DPO's loss and both implicit rewards, each fp32 [P].

    `(-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2e)` (Chowdhury et al. 2024, eq. 12): in
    expectation over labels flipped with probability e, it equals `dpo` on the clean ones. May be negative.
    Raises ValueError unless 0 <= e < 0.5.
    """
    _check_smoothing(label_smoothing)
    win, lose = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    margin = win - lose
    signed = -(1 - label_smoothing) * logsigmoid(margin) + label_smoothing * logsigmoid(-margin)
    return signed / (1 - 2 * label_smoothing), win.detach(), lose.detach()


def hinge(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Triple:
    """Return the hinge loss `max(0, 1 - beta h)` (SLiC; Liu et al. 2023, RSO) and both implicit rewards, each fp32 [P].

    Raises ValueError for a non-zero `label_smoothing`, which this loss has no meaning for.
    """
    _refuse_smoothing("hinge", label_smoothing)
    win, lose = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    return (1 - (win - lose)).relu(), win.detach(), lose.detach()


def ipo(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    beta: float,
    label_smoothing: float = 0.0,
) -> Triple:
    """Return IPO's loss `(h - 1 / (2 beta))^2` and both implicit rewards, each fp32 [P]; inputs are per-token means.

    Azar et al. 2023, eq. 17, with beta in the place of their tau. Raises ValueError for a non-zero `label_smoothing`,
    which this loss has no meaning for.
    """
    _refuse_smoothing("ipo", label_smoothing)
    win, lose = _rewards(policy_chosen, policy_rejected, ref_chosen, ref_rejected, beta)
    lead = (win - lose) / beta
    return (lead - 1 / (2 * beta)).square(), win.detach(), lose.detach()


def check_beta(beta: float) -> None:
    """Raise ValueError unless beta is positive: it is what turns log-probabilities into rewards."""
    if not beta > 0:
        raise ValueError(f"beta {beta} is not positive")


def _rewards(
    policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, beta: float
) -> tuple[Tensor, Tensor]:
    """Return the implicit rewards of the chosen and the rejected (Rafailov et al. 2023, eq. 5, partition dropped)."""
    check_beta(beta)
    return beta * (policy_chosen.float() - ref_chosen.float()), beta * (policy_rejected.float() - ref_rejected.float())


def _check_smoothing(label_smoothing: float) -> None:
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing {label_smoothing} is not in [0, 0.5): at 0.5 labels say nothing")


def _refuse_smoothing(name: str, label_smoothing: float) -> None:
    if label_smoothing:
        raise ValueError(f"{name} has no label_smoothing (got {label_smoothing}); use dpo or robust_dpo")
