"""An exponential moving average of the weights, kept in fp32 beside the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.optim.swa_utils import get_ema_multi_avg_fn

from trivium.training.parallel import copy_whole, mesh_of


class Average:
    """The moving average of a model's trainable weights: `average = decay * average + (1 - decay) * weights`.

    It starts at the weights it is made with. Worked: decay 0.5 from weight 0, which then is 2, 4 and 8, gives
    1, 2.5 and 5.25.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        """Copy the trainable weights of `model`."""
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().to(torch.float32, copy=True) for name, p in self._parameters.items()}
        self._update = get_ema_multi_avg_fn(decay)  # type: ignore[no-untyped-call]

        # What is sharded is averaged where it lies; one call takes tensors of one mesh.
        self._groups: dict[DeviceMesh | None, list[str]] = {}
        for name, parameter in self._parameters.items():
            self._groups.setdefault(mesh_of(parameter), []).append(name)

    def update(self) -> None:
        """Move the average towards the weights as they are now."""
        for names in self._groups.values():
            now = [self._parameters[name].detach().to(torch.float32) for name in names]
            self._update([self._average[name] for name in names], now, 0)

    def tensors(self) -> dict[str, Tensor]:
        """Return the averages as named tensors, sharded as the weights are, for a checkpoint."""
        return dict(self._average)

    def load_tensors(self, flat: dict[str, Tensor]) -> None:
        """Take `tensors()` back, each of them whole."""
        for name, value in flat.items():
            copy_whole(self._average[name], value)

    def copy_to_model(self) -> None:
        """Replace the model's weights by their average."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(self._average[name])

    @contextlib.contextmanager
    def in_model(self) -> Iterator[None]:
        """Let the model have the average as its weights for a while; its own come back to the bit."""
        own = {name: p.detach().clone() for name, p in self._parameters.items()}
        try:
            self.copy_to_model()
            yield
        finally:
            with torch.no_grad():
                for name, parameter in self._parameters.items():
                    parameter.copy_(own[name])
