"""Preference losses without a reference: what the policy itself thinks of both completions, per token.

Both take the policy's **mean** log-probability per token of the chosen and the rejected completion, each [P], and
return the loss [P] and the implicit rewards `beta * mean log pi` of both sides [P], detached, as `losses/dpo.py` does.
Without a reference nothing holds the policy where it was: ORPO's likelihood term and a short training do.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from trivium.losses.dpo import Triple, check_beta

CERTAIN = -1e-7
"""The highest mean log-probability that odds are formed of: at 0 they would be infinite."""


def simpo(policy_chosen: Tensor, policy_rejected: Tensor, beta: float, gamma: float) -> Triple:
    """Return SimPO's loss and both implicit rewards, each fp32 [P].

    `-log sigmoid(beta (m_w - m_l) - gamma)`, m the mean log-probability per token (Meng et al. 2024, arXiv 2405.14734,
    eq. 6). `gamma` is the lead, in units of the reward, below which the loss still pulls. The paper's beta is 2 to 10
    and its gamma 0.3 to 1.6: means per token are small numbers. Raises ValueError unless beta > 0 and gamma >= 0.

    Worked, beta 2, gamma 1: m_w - m_l = 0, 0.5, 1 give 1.3133, 0.6931, 0.3133.
    """
    check_beta(beta)
    if gamma < 0:
        raise ValueError(f"gamma {gamma} is negative: the rejected completion would be asked to lead")
    win, lose = beta * policy_chosen.float(), beta * policy_rejected.float()
    return -logsigmoid(win - lose - gamma), win.detach(), lose.detach()


def orpo(policy_chosen: Tensor, policy_rejected: Tensor, beta: float) -> Triple:
    """Return ORPO's loss and both implicit rewards, each fp32 [P].

    `-m_w - beta log sigmoid(log odds(m_w) - log odds(m_l))`, `odds(m) = e^m / (1 - e^m)` (Hong et al. 2024, arXiv
    2403.07691, eq. 4, 6 and 7, with beta in the place of their lambda). The first term is the negative log-likelihood
    of the chosen completion, per token; of the completion alone, where the authors' code counts the prompt too. So it
    fine-tunes and prefers at once, and can start from a base model. Raises ValueError unless beta > 0.

    Worked, beta 1, m_w = ln(1/2), m_l = ln(1/3): odds 1 and 1/2, so 0.6931 + ln(1 + 1/2) = 1.0986.
    """
    check_beta(beta)
    chosen, rejected = policy_chosen.float(), policy_rejected.float()
    lead = _log_odds(chosen) - _log_odds(rejected)
    return -chosen - beta * logsigmoid(lead), (beta * chosen).detach(), (beta * rejected).detach()


def _log_odds(logprobs: Tensor) -> Tensor:
    logprobs = logprobs.clamp(max=CERTAIN)
    return logprobs - torch.log(-torch.expm1(logprobs))
