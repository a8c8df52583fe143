"""Which of how many processes this is, as torchrun's environment variables say; no torch."""

from __future__ import annotations

import os
from dataclasses import dataclass

from trivium.config import ConfigError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun sets for each process. The first three make a process a rank; an address alone means nothing."""


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among all (`rank` of `size`) and among those of its machine (`local_rank` of `local_size`)."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process owns the workspace and speaks for all."""
        return self.rank == 0


def ranks_from_environment() -> Ranks:
    """Return what torchrun's variables say; one process alone without them.

    Raises ConfigError when they are half set or no numbers that fit together.
    """
    given = [name for name in VARIABLES if os.environ.get(name)]
    if not set(given) & set(VARIABLES[:3]):
        return Ranks()
    if missing := [name for name in VARIABLES if name not in given]:
        raise ConfigError(
            f"{', '.join(given)} set but {', '.join(missing)} not: start with `torchrun --nproc-per-node N -m trivium "
            "run RECIPE`, or unset them to run as one process"
        )
    numbers = {name: os.environ.get(name, "1") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    for name, text in numbers.items():
        if not text.isdigit():
            raise ConfigError(f"{name} = {text!r}: must be a whole number; torchrun sets it")
    rank, size, local_rank, local_size = (int(text) for text in numbers.values())
    if not rank < size:
        raise ConfigError(f"RANK = {rank}: must be below WORLD_SIZE = {size}; torchrun sets both")
    return Ranks(rank=rank, size=size, local_rank=local_rank, local_size=max(1, local_size))
