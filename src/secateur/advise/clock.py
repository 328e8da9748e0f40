"""The time that a search may take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_AGAIN = 10.0  # seconds after which it is raised again, where somebody on the way swallowed it; cleaning up takes less


class OutOfTime(BaseException):
    """The time is up. Not an Exception, so that nothing on the way takes it for a failure of its own."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raise `OutOfTime` in the block after `seconds` of the clock, wherever it is: a single stage may take minutes.

    By a timer signal, which only the main thread gets, and only where there are such signals; elsewhere nothing is raised.
    """
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def up(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, up)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), _AGAIN)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
    finally:  # again, for a signal that came between the last line of the block and this one
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)
