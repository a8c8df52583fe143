"""Weights in bf16 without an fp32 copy: the 16 bits that rounding drops are kept, and go into the next update.

A bf16 weight has 8 bits, so an update below 1/512 of it is rounded away, and most are (pytorch/ao#1124). Kahan's
summation (1965) keeps what was dropped beside it. Here that is a 16-bit integer, the lower half of the fp32 number
(Split-SGD-BF16: Kalamkar et al. 2020, arXiv 2005.04680), so nothing is lost: the two halves are fp32's weight to the
bit. Measured against a bf16 remainder and stochastic rounding: docs/concepts/precision.md.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from trivium.config import ConfigError

KEPT = "lower_bits"
"""The optimizer's state that holds what rounding dropped (int16), so that a checkpoint has it."""

SLOWEST_IN_BF16 = 0.97
"""The largest decay of a moving average that bf16 can hold: at 0.999 a step moves it by less than half of its last bit,
and it stays where it is; at 0.97 it follows what differs from it by an eighth."""


def check_trainable(parameters: Sequence[Tensor]) -> None:
    """Raise ConfigError for weights that would not learn: another half precision than bf16, or sharded bf16."""
    for parameter in parameters:
        if parameter.dtype not in (torch.float32, torch.float64, torch.bfloat16):
            name = str(parameter.dtype).removeprefix("torch.")
            raise ConfigError(f"the weights to train are {name}: load them in fp32, or in bf16 with bf16-pure")
        if parameter.dtype is torch.bfloat16 and isinstance(parameter, DTensor):
            raise ConfigError("sharded weights are trained in fp32 alone; set precision to bf16, or parallel to 'ddp'")


def is_compensated(parameter: Tensor) -> bool:
    """Tell whether what rounding drops of this parameter is kept: it has fewer bits than its updates need."""
    return parameter.dtype is torch.bfloat16


def moment_dtype(parameter: Tensor, decay: float) -> torch.dtype:
    """Return the dtype for a moving average of the parameter's gradients: its own, where that can hold it."""
    return torch.float32 if is_compensated(parameter) and decay > SLOWEST_IN_BF16 else parameter.dtype


@contextlib.contextmanager
def widened(parameter: Tensor, state: MutableMapping[str, Tensor]) -> Iterator[Tensor]:
    """Yield the weight to update in place: the parameter itself, or for a bf16 one the fp32 number that it rounds.

    On leaving, that number is rounded into the parameter and the rest of its bits goes to `KEPT`.
    Worked: from weight 1, above which bf16 has steps of 1/128, three updates of 1/512 give (1, 1/512), then half a
    step, which is rounded up: (1 + 4/512, -2/512), then (1 + 4/512, -1/512). bf16 alone stays at 1.
    """
    if not is_compensated(parameter):
        yield parameter
        return
    upper = parameter.detach().view(torch.int16)
    lower = state.setdefault(KEPT, torch.zeros_like(upper))
    wide = ((upper.to(torch.int32) << 16) + lower).view(torch.float32)
    yield wide
    bits = wide.view(torch.int32)
    # Half a step above and then cut off: rounded to the nearest, whichever the sign, which has a bit of its own.
    upper.copy_((bits + 0x8000) >> 16)
    lower.copy_(bits - (upper.to(torch.int32) << 16))


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` for weights in bf16 too: torch's own update, in fp32 on the widened weight."""

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the loop computes the gradient before the step
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if "step" not in state:
                    state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                    for name, decay in zip(("exp_avg", "exp_avg_sq"), group["betas"], strict=True):
                        state[name] = torch.zeros_like(parameter, dtype=moment_dtype(parameter, decay))
                first, second = state["exp_avg"].float(), state["exp_avg_sq"].float()
                with widened(parameter, state) as weight:
                    adamw(
                        [weight],
                        [parameter.grad.to(weight.dtype)],
                        [first],
                        [second],
                        [],
                        [state["step"]],
                        fused=True,
                        amsgrad=False,
                        beta1=group["betas"][0],
                        beta2=group["betas"][1],
                        lr=group["lr"],
                        weight_decay=group["weight_decay"],
                        eps=group["eps"],
                        maximize=False,
                    )
                # Of those kept in fp32 `float` was no copy, and nothing is to be rounded.
                state["exp_avg"].copy_(first)
                state["exp_avg_sq"].copy_(second)


def state_bytes(parameter: Tensor, decays: Sequence[float]) -> int:
    """Return the bytes that an optimizer keeps for a parameter: one average per decay, and what rounding dropped."""
    sizes = [moment_dtype(parameter, decay).itemsize for decay in decays]
    return parameter.numel() * (sum(sizes) + (parameter.element_size() if is_compensated(parameter) else 0))
