"""Where the work happens: device, threads, precision, and how many processes share it.

The only room that imports `torch.distributed`; a single process needs no process group and pays nothing.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from trivium.config import ConfigError, RunSettings, Signalled, Stopped, UserError
from trivium.runs.ranks import ranks_from_environment
from trivium.training.allocator import keep_freed_memory
from trivium.training.timing import product_seconds

T = TypeVar("T")

POLL_S = 0.05
"""How often a rank that waits for rank 0 looks: felt by nobody, and between two looks a signal gets through."""
GRACE_S, STOP_GRACE_S = 2.0, 30.0
"""How long another rank lets rank 0 finish before it ends itself, which makes the launcher end rank 0: after a mistake
(rank 0 writes a manifest), and after a stop (it may still write a checkpoint)."""


class _Told(UserError):
    """A mistake that rank 0 made and tells of; here it only ends the work."""


class _Group:
    """The store behind the process group, through which rank 0 tells the others what it decided; how ranks are laid."""

    store: Any = None
    decisions: int = 0
    tensor: int = 1
    context: int = 1


def setup(settings: RunSettings) -> None:
    """Join the ranks, if there are several, and set this one's thread count: oversubscription costs tenfold on CPU.

    Without `threads` it is one thread per core that we may use, shared among the ranks of this machine.
    Raises ConfigError when torchrun's variables are half set.
    """
    ranks = ranks_from_environment()
    cores = num_cores()
    if ranks.local_size > 1:
        # torchrun itself sets OMP_NUM_THREADS to 1 where nobody did, so a 1 is nobody's word.
        if os.environ.get("OMP_NUM_THREADS", "") == "1":
            cores = _cores_allowed()
        cores = max(1, cores // ranks.local_size)
    torch.set_num_threads(settings.threads or cores)
    alone = ranks.size == 1
    _Group.tensor, _Group.context = (1, 1) if alone else (settings.tensor_parallel, settings.context_parallel)
    if alone or dist.is_initialized():
        return
    timeout = timedelta(seconds=settings.rank_timeout_s)
    backend = "gloo"
    if device_of(settings).type == "cuda":
        torch.cuda.set_device(device_of(settings))
        backend = "cpu:gloo,cuda:nccl"
    try:
        store, rank, size = next(rendezvous("env://", timeout=timeout))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(f"rank {ranks.rank} could not meet the {ranks.size - 1} others at {where}: {error}") from None
    _Group.store, _Group.decisions = store, 0


@contextlib.contextmanager
def joined(settings: RunSettings) -> Iterator[None]:
    """Work as one of the ranks that torchrun started, and leave together; alone it only sets the threads.

    When a rank fails, the first to do so says why, once, and every rank ends with the same exit code: those that
    wait for it in a collective find it gone. So an error leaves here as itself on rank 0 or on one process alone, and
    as SystemExit on the others.
    """
    keep_freed_memory()
    setup(settings)
    if world()[1] == 1:
        yield
        return
    rank = world()[0]
    try:
        check_layout(settings, world()[1])
        yield
        _let_rank_0_go_last()
    except BaseException as error:
        first = not isinstance(error, _Told) and _first_to_fail()
        if rank == 0:
            _publish("left", "")
        else:
            _await("left", patience=STOP_GRACE_S if isinstance(error, Stopped) else GRACE_S)
        if first and not isinstance(error, UserError | KeyboardInterrupt):
            raise
        if first and rank == 0:
            raise
        if first:
            print(f"trivium: {' '.join(str(error).split()) or 'stopped'} (rank {rank})", file=sys.stderr, flush=True)
        raise SystemExit(getattr(error, "exit_code", 1)) from None
    leave()


def _let_rank_0_go_last() -> None:
    """Wait on rank 0, whose process may hold the store, until the others have read there what it last decided."""
    rank, size = world()
    store = _Group.store
    with contextlib.suppress(RuntimeError):  # the store went down with a rank that failed, which the launcher tells
        if rank:
            store.add("trivium/through", 1)
            return
        while store.add("trivium/through", 0) < size - 1 and not store.check(["trivium/failures"]):
            time.sleep(POLL_S)


def leave() -> None:
    """Leave the process group, if there is one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    _Group.store, _Group.tensor, _Group.context = None, 1, 1


def decide(compute: Callable[[], T]) -> T:
    """Return on every rank what rank 0 computes (JSON-able): the others wait as long as it takes.

    They wait by looking at the store, not in a collective: nothing times out while rank 0 reads a corpus for hours.
    A UserError that rank 0 raises is raised everywhere.
    """
    rank, size = world()
    if size == 1:
        return compute()
    _Group.decisions += 1
    key = f"decision/{_Group.decisions}"
    if rank:
        told = json.loads(_await(key))
        if "error" in told:
            error = _Told(told["error"])
            error.exit_code = told["exit_code"]
            raise error
        return told["value"]  # type: ignore[no-any-return]
    try:
        value = compute()
    except (UserError, Signalled) as error:
        told = error.stopped if isinstance(error, Signalled) else error
        _publish(key, json.dumps({"error": str(told), "exit_code": told.exit_code}))
        raise
    _publish(key, json.dumps({"value": value}))
    return value


def first_alone(work: Callable[[], object]) -> None:
    """Run `work` on rank 0 alone while the others wait."""

    def run() -> None:
        work()

    decide(run)


def _publish(key: str, value: str) -> None:
    with contextlib.suppress(RuntimeError):  # the store is gone with the launcher: nobody is left to be told
        _Group.store.set(f"trivium/{key}", value)


def _await(key: str, patience: float = float("inf")) -> str:
    """Return what rank 0 published under `key`, or "" when it did not within `patience` seconds.

    Waiting without end, it raises when another rank fails meanwhile.
    """
    end = time.monotonic() + patience
    store = _Group.store
    while time.monotonic() < end:
        try:
            if store.check([f"trivium/{key}"]):
                return str(store.get(f"trivium/{key}").decode())
            if patience == float("inf") and store.check(["trivium/failures"]):
                raise _Told("another rank ended")
        except RuntimeError:
            if patience == float("inf"):
                raise _Told("the other ranks are gone") from None
            return ""
        time.sleep(POLL_S)
    return ""


def _first_to_fail() -> bool:
    """Tell whether no other rank has failed before."""
    try:
        return bool(_Group.store.add("trivium/failures", 1) == 1)
    except RuntimeError:  # the store went down with the rank that held it
        return False


def num_cores() -> int:
    """Return how many cores this process may use; OMP_NUM_THREADS, where set, is the user's own word."""
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdigit() and int(wanted) > 0 else _cores_allowed()


def _cores_allowed() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none


def device_of(settings: RunSettings) -> torch.device:
    """Return the device that the settings ask for; of several ranks on a machine with GPUs each has its own.

    Raises ConfigError when it is CUDA and there is none.
    """
    name = settings.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device = {name!r}: must be auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device = {name!r}: this torch ({torch.__version__}) sees no CUDA device; use cpu or auto")
    ranks = ranks_from_environment()
    if device.type == "cuda" and ranks.size > 1:
        if ":" in name or ranks.local_size > torch.cuda.device_count():
            raise ConfigError(
                f"device = {settings.device!r} with {ranks.local_size} ranks on a machine of "
                f"{torch.cuda.device_count()} GPUs: each rank needs one of its own; use cuda or auto, and fewer ranks"
            )
        return torch.device("cuda", ranks.local_rank)
    return device


def compute_dtype(settings: RunSettings) -> torch.dtype:
    """Return the dtype of the matrix products: bf16 where this machine multiplies it clearly faster, else fp32."""
    if settings.precision != "auto":
        return torch.float32 if settings.precision == "fp32" else torch.bfloat16
    if device_of(settings).type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if _bf16_pays() else torch.float32


def weight_dtype(settings: RunSettings) -> torch.dtype:
    """Return the dtype in which a stage keeps the weights that it trains: fp32, or bf16 for `bf16-pure`."""
    return torch.bfloat16 if settings.precision == "bf16-pure" else torch.float32


def precision_name(settings: RunSettings) -> str:
    """Return what `precision` comes to on this machine, as a run's fingerprint has it: results depend on it."""
    if settings.precision in ("bf16-pure", "fp8"):
        return settings.precision
    return str(compute_dtype(settings)).removeprefix("torch.")


@functools.cache
def _bf16_pays() -> bool:
    """Tell whether this CPU multiplies bf16 matrices at least 1.5 times as fast as fp32 ones.

    What a processor supports does not say it: with AMX bf16 is ten times as fast, with AVX-512 BF16 alone six times on
    one processor and half as fast on another (docs/LOG.md). Without either it is emulated, and nothing is measured.
    """
    if not any(getattr(torch.cpu, f"_is_{unit}_supported", bool)() for unit in ("amx_tile", "avx512_bf16")):
        return False
    fp32, bf16 = product_seconds([torch.float32, torch.bfloat16], torch.device("cpu"), side=768)
    return fp32 > 1.5 * bf16


def autocast(settings: RunSettings) -> contextlib.AbstractContextManager[object]:
    """Return the context in which forward passes run: autocast to bf16, or nothing.

    Of weights in bf16 there is nothing to cast; what else a pass uses (an fp32 reward model, say) is lowered as ever.
    """
    if compute_dtype(settings) is torch.float32:
        return contextlib.nullcontext()
    return torch.autocast(device_of(settings).type, dtype=torch.bfloat16)


def world() -> tuple[int, int]:
    """Return (rank, world size); (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def tensor_ranks() -> int:
    """Return how many ranks have one copy of the layers between them; 1 without a group."""
    return _Group.tensor


def context_ranks() -> int:
    """Return how many ranks have the positions of each row between them; 1 without a group."""
    return _Group.context


def row_ranks() -> int:
    """Return how many ranks work on the same rows, whether they share matrices or positions; 1 without a group."""
    return _Group.tensor * _Group.context


def data_ranks() -> tuple[int, int]:
    """Return (rank, size) among those that train on different rows: what a loader shares them by.

    The ranks that work on the same rows, which are neighbours, have one number. Worked: of ranks 0 1 2 3 with
    `tensor_parallel = 2` or `context_parallel = 2`, 0 and 1 are (0, 2), 2 and 3 are (1, 2).
    """
    rank, size = world()
    return rank // row_ranks(), size // row_ranks()


def check_layout(settings: RunSettings, size: int) -> None:
    """Raise ConfigError when `size` ranks are not whole groups that work on the same rows."""
    group = settings.tensor_parallel * settings.context_parallel
    if size % group:
        shared = {"tensor_parallel": settings.tensor_parallel, "context_parallel": settings.context_parallel}
        named = " times ".join(f"{name} = {number}" for name, number in shared.items() if number > 1)
        raise ConfigError(f"{named} does not divide the {size} ranks; start a multiple of {group}, or lower it")


def check_shares(**sizes: int) -> None:
    """Raise ConfigError when a named batch has fewer rows than there are ranks (or groups of them) to share it."""
    shares = data_ranks()[1]
    for name, size in sizes.items():
        if size < shares:
            who = "ranks" if row_ranks() == 1 else f"groups of {row_ranks()} ranks"
            raise ConfigError(f"{name} = {size} rows cannot be shared by {shares} {who}; raise it, or use fewer ranks")


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of `value` over the groups with different rows (itself when there is one).

    What a group has is its ranks' mean: all have the same, or each its own positions' times their number. All ranks are
    summed, and the sum divided: so every rank has the same figure to the bit, and all decide alike by it.
    """
    total, group = _reduced(value, dist.ReduceOp.SUM), row_ranks()
    return total / group if total.is_floating_point() else total // group


def all_reduce_max(value: int) -> int:
    """Return the largest `value` of all ranks (itself when there is one)."""
    return value if world()[1] == 1 else int(_reduced(torch.tensor(value), dist.ReduceOp.MAX))


def barrier() -> None:
    """Wait until every rank is here."""
    all_reduce_max(0)


def gather_rows(rows: Tensor) -> Tensor:
    """Return the rows of all ranks, [N, ...], in the order from which `items[rank::size]` was each rank's share.

    `rows`: this rank's [n, ...], the other dimensions equal on all ranks.
    Worked: rank 0 has rows a c e, rank 1 has b d; every rank gets a b c d e.
    """
    size = world()[1]
    if size == 1:
        return rows
    longest = all_reduce_max(len(rows))
    padded = rows.new_zeros((longest, *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(size)]
    dist.all_gather(parts, padded)
    total = int(_reduced(torch.tensor(len(rows)), dist.ReduceOp.SUM))
    return torch.stack(parts, 1).flatten(0, 1)[:total]


def share(rows: Tensor) -> Tensor:
    """Return this rank's part of the rows to train on: every `size`-th; all of them on one process alone."""
    rank, size = data_ranks()
    return rows[rank::size]


def over_ranks(count: int, compute: Callable[[list[int]], Tensor], *, group: int = 1) -> Tensor:
    """Return `compute(range(count))` [count, ...], the work split over ranks by whole groups of `group` neighbours.

    `compute` goes from row numbers to a tensor with a row for each, whose other dimensions are equal on all ranks.
    For work outside of a step, where each rank has whole weights: ranks that share rows in a step do different ones.
    """
    rank, size = world()
    if size == 1:
        return compute(list(range(count)))
    groups = range(count // group)[rank::size]
    # A rank for which none is left does the first one over again, for the shape alone.
    asked = groups or range(1)
    part = compute([number * group + place for number in asked for place in range(group)])
    part = part.view(len(asked), group, *part.shape[1:])
    return gather_rows(part[: len(groups)]).flatten(0, 1)


def _reduced(value: Tensor, operation: Any) -> Tensor:
    if world()[1] > 1:
        value = value.clone()
        dist.all_reduce(value, operation)
    return value
