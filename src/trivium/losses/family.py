"""Which preference loss needs what: the choices behind `loss = "..."` in the dpo stage."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from trivium.losses.dpo import dpo, hinge, ipo, robust_dpo
from trivium.losses.kto import kto
from trivium.losses.reference_free import orpo, simpo


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """A loss, what it is computed from, and the settings that mean something to it.

    `compute` takes the policy's log-probabilities of chosen and rejected, then the reference's where `uses_reference`;
    where not `paired`, of each completion by itself. They are sums over the completion, or means where `per_token`.
    `arguments` are the settings passed to it by name, beside `beta`; `options` those that change what goes in.
    """

    compute: Callable[..., tuple[Tensor, ...]]
    uses_reference: bool = True
    per_token: bool = False
    paired: bool = True
    arguments: tuple[str, ...] = ()
    options: tuple[str, ...] = ("length_normalised", "nll_coef")


FAMILY: dict[str, PreferenceLoss] = {
    "dpo": PreferenceLoss(compute=dpo, arguments=("label_smoothing",)),
    "robust": PreferenceLoss(compute=robust_dpo, arguments=("label_smoothing",)),
    "hinge": PreferenceLoss(compute=hinge),
    "ipo": PreferenceLoss(compute=ipo, per_token=True, options=("nll_coef",)),
    "simpo": PreferenceLoss(
        compute=simpo, uses_reference=False, per_token=True, arguments=("gamma",), options=("nll_coef",)
    ),
    "orpo": PreferenceLoss(compute=orpo, uses_reference=False, per_token=True, options=()),
    "kto": PreferenceLoss(compute=kto, paired=False, arguments=("desirable_weight", "undesirable_weight"), options=()),
}
"""By the name that a recipe gives."""


def meaningful_to(setting: str) -> tuple[str, ...]:
    """Return the losses to which a setting means something, in the order in which one would explain them."""
    return tuple(name for name, each in FAMILY.items() if setting in each.arguments + each.options)
