"""Muon with matrices of one shape orthogonalised together: torch's update, in a tenth of the calls.

`torch.optim.Muon` takes the matrices one after the other; at the widths of a laptop each product is smaller than the
cost of asking for it (docs/LOG.md). Its arguments, state and result are kept, so either reads the other's checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trivium.training.compensation import moment_dtype, widened
from trivium.training.parallel import shard_like, whole_tensor


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` (Jordan et al. 2024) whose `step` works on stacks of equal shape.

    With `adjust_lr_fn="match_rms_adamw"` (Liu et al. 2025, arXiv 2502.16982, equation 4) or `"original"`.
    """

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closure: the loop computes the gradient before the step
        """Move every parameter that has a gradient: momentum, orthogonalisation, decay and the step itself."""
        for group in self.param_groups:
            stacks: dict[tuple[torch.Size, torch.device], list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    stacks.setdefault((parameter.shape, parameter.device), []).append(parameter)
            for parameters in stacks.values():
                self._move(group, parameters)

    def _move(self, group: dict[str, Any], parameters: Sequence[Tensor]) -> None:
        updates = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                kind = moment_dtype(parameter, group["momentum"])
                state["momentum_buffer"] = torch.zeros_like(parameter.grad, dtype=kind)
            gradient = parameter.grad.to(state["momentum_buffer"].dtype)
            buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
            updates.append(gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer)
        rows, columns = parameters[0].shape
        ratio = 0.2 * math.sqrt(max(rows, columns))
        if group["adjust_lr_fn"] != "match_rms_adamw":
            ratio = math.sqrt(max(1, rows / columns))
        # The iteration needs whole matrices: sharded ones are gathered, and each rank keeps its part of the result.
        stack = torch.stack([whole_tensor(update) for update in updates])
        moves = orthogonalise(stack, group["ns_coefficients"], group["ns_steps"], group["eps"])
        for parameter, move in zip(parameters, moves, strict=True):
            with widened(parameter, self.state[parameter]) as weight:
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(shard_like(parameter, move), alpha=-group["lr"] * ratio)


def orthogonalise(stack: Tensor, coefficients: Sequence[float], steps: int, eps: float) -> Tensor:
    """Return each matrix of `stack` [N, R, C] with its singular values moved near 1, by a quintic Newton-Schulz.

    `X <- a X + (b A + c A A) X` with `A = X X^T`, from X of Frobenius norm 1; the smaller side is kept in front. In
    bfloat16, as the method was published, where matrix units make that faster; else in the stack's dtype or fp32.
    """
    a, b, c = coefficients
    wide = stack.mT if stack.shape[1] > stack.shape[2] else stack
    # A fact about the processor, not a measurement: a resumed run must not find another answer.
    is_plain_cpu = stack.device.type == "cpu" and not getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    x = wide.to(torch.promote_types(wide.dtype, torch.float32)) if is_plain_cpu else wide.bfloat16()
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if stack.shape[1] > stack.shape[2] else x).to(stack.dtype)
