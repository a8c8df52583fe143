"""Stopping in good order: a signal or the time limit ends the work at a whole step, with everything saved.

SIGTERM, Ctrl-C and the time limit (a SIGALRM that the process sets for itself) take one road. Inside the loop they are
noted, and acted on between steps; outside it they leave at once, because there is nothing to finish. A second SIGTERM
or Ctrl-C acts at once everywhere.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import ParamSpec, TypeVar

from trivium.config import Signalled, Stopped
from trivium.training.distributed import all_reduce_max, world

P = ParamSpec("P")
T = TypeVar("T")
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGALRM)
"""What asks a run to stop."""


class Interrupted(BaseException):
    """A signal came during work that is done again after resuming; not an Exception, so that nobody swallows it."""


class StopRequest:
    """Whether a signal asked the loop to stop at the end of the step it is in."""

    def __init__(self) -> None:
        """Start with no signal received."""
        self.received = 0
        """The signal that this process got; 0 means none."""
        self.signal = 0
        """The signal that all ranks know of, once they have `agreed`: they must stop after the same step."""
        self.hurry = False
        """Whether a second one came: nothing is waited for any more."""
        self._interrupts = False

    def note(self, number: int) -> bool:
        """Take a signal in and tell whether it must act at once; raises Interrupted inside `interruptible`."""
        if self.received in (signal.SIGTERM, signal.SIGINT):
            self.hurry = self.hurry or number != signal.SIGALRM
            return self.hurry
        # The time limit is not a person's word: a SIGTERM after it is the first, and says how the run ended.
        self.received = number
        if self._interrupts:
            self._interrupts = False
            raise Interrupted
        return False

    def agreed(self) -> int:
        """Return the signal, if any of the ranks received one; all must ask at the same places.

        One that arrives while they agree is still in `received` for the next time.
        """
        self.signal = all_reduce_max(self.received)
        return self.signal

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """Raise Interrupted as soon as there is a request, one that came before included; never on several ranks.

        Those have to do the same work, and one of them would leave the others waiting.
        """
        if world()[1] > 1:
            yield
            return
        if self.received:
            raise Interrupted
        self._interrupts = True
        try:
            yield
        except Exception as error:
            if not self._interrupts:  # `note` has raised it, and C code took it for a failure: see `heed`
                raise Interrupted from error
            raise
        finally:
            self._interrupts = False


@contextlib.contextmanager
def graceful_stop() -> Iterator[StopRequest]:
    """Yield a StopRequest that SIGTERM, Ctrl-C or the time limit sets; a second signal does what it did before."""
    request = StopRequest()
    before: dict[int, object] = {}

    def handle(number: int, _: FrameType | None) -> None:
        if request.note(number):
            signal.signal(number, before[number] or signal.SIG_DFL)  # type: ignore[arg-type]
            signal.raise_signal(number)

    with contextlib.suppress(ValueError):  # not the main thread: the embedding program owns the signals
        for number in SIGNALS:
            before[int(number)] = signal.signal(number, handle)
    try:
        yield request
    finally:
        for known, handler in before.items():
            signal.signal(known, handler or signal.SIG_DFL)  # type: ignore[arg-type]
    if request.received and not request.signal:  # it came after the last look; whoever had the signals is told
        signal.raise_signal(request.received)


def raise_if_stopped(request: StopRequest, step: int) -> None:
    """Raise Stopped when a signal asked for it; the caller has just saved a checkpoint."""
    if request.signal:
        raise Stopped(request.signal, f"{_reason(request.signal)} after step {step}, checkpoint saved")


@contextlib.contextmanager
def stoppable(time_limit_s: float) -> Iterator[None]:
    """Turn SIGTERM, and the end of `time_limit_s` seconds (0: none), into Stopped: the same door as Ctrl-C.

    A signal that comes while this leaves finds the work over, or stopped already, and changes nothing.
    """
    leaving = False

    def stop(number: int, _: FrameType | None) -> None:
        if not leaving:
            _raised.append(Signalled(number, _reason(number) or " by SIGTERM"))
            raise _raised[-1]

    _raised.clear()
    numbers = [signal.SIGTERM, signal.SIGALRM] if time_limit_s else [signal.SIGTERM]
    if threading.current_thread() is not threading.main_thread():  # the embedding program owns the signals
        numbers = []
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        try:
            for number in numbers:
                signal.signal(number, stop)
            if signal.SIGALRM in numbers:
                signal.setitimer(signal.ITIMER_REAL, time_limit_s)
            yield
        finally:
            leaving = True
    except Signalled as signalled:
        leaving = True  # the signal may have come just before this was said above
        raise signalled.stopped from None
    finally:
        if signal.SIGALRM in numbers:
            signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


_raised: list[Signalled] = []
"""What `stoppable` has raised, whether or not it arrived."""


def heed(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do the work; where it fails after `stoppable` has raised Signalled, raise that, and not what it became.

    A handler may run while C code calls Python (safetensors has torch make a tensor), which takes any exception for its
    own kind of failure: a SIGTERM then looks like a damaged file.
    """
    try:
        return work(*args, **kwargs)
    except Stopped:
        raise
    except Exception as error:
        if _raised:
            raise _raised[-1] from error
        raise


def _reason(number: int) -> str:
    return " at the time limit" if number == signal.SIGALRM else ""
