"""How a command ends: with which exit code, and what it says when it is not done.

Interrupted (Ctrl-C, SIGINT), told to stop (SIGTERM) or left by its terminal (SIGHUP), a command unwinds like any error, so that
temporary files are removed on the way.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from secateur import terminal
from secateur.errors import InputError, SecateurError, first_line, out_of_memory

DONE, REFUSED, WRONG, DEFECT, HUNG_UP, INTERRUPTED, NO_READER, TERMINATED = 0, 1, 2, 3, 129, 130, 141, 143
STOPPED = {HUNG_UP: "hung up", INTERRUPTED: "interrupted", TERMINATED: "terminated"}
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
CODES = (
    "Exit codes: 0 done; 1 refused, nothing was changed; 2 wrong usage; 3 a defect of secateur; "
    "129 hung up, 130 interrupted and 143 terminated, without half-written files; 141 nobody reads the output."
)
_AGAIN = 1.0  # seconds in which a second signal is the same impatience as the first


def ending(work: Callable[[], object], debug: bool = False, last: bool = False) -> int:
    """Run `work` and return the exit code; what it raises becomes one message on standard error, with `debug` below its traceback.

    `last`: nothing comes after it in this process, so that once it is stopped further signals have nothing to stop.
    """
    with suppress(AttributeError, OSError, ValueError):  # a terminal that has no sign for µ or ± shows another one
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]
    with _stoppable(last) as stopped:
        code = _caught(work, debug)
        if stopped and code == INTERRUPTED:
            code = 128 + stopped[0]
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        code = NO_READER
    except OSError:
        if code not in STOPPED:  # a terminal that is gone takes nothing any more
            raise
    if code in STOPPED:
        with suppress(OSError):
            terminal.error(STOPPED[code])
    if code == NO_READER:  # what is still held back would fail once more when Python ends
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def _caught(work: Callable[[], object], debug: bool) -> int:
    try:
        work()
        return DONE
    except SystemExit as stop:  # how typer ends: done, wrong usage, interrupted
        if _has_no_reader(stop):
            return NO_READER
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        return NO_READER
    except Exception as error:
        if debug:
            traceback.print_exc()
        return _refused(error)


def _refused(error: Exception) -> int:
    """Say what went wrong; the exit code."""
    if isinstance(error, SecateurError):
        terminal.error(str(error))
        return WRONG if isinstance(error, InputError) else REFUSED
    first = first_line(error, 1000)
    if out_of_memory(error):
        cpu = ", or train with --device cpu" if "CUDA" in first else ""
        terminal.error(f"there is not enough memory: {first or 'Python has none left'}.\n  Take a smaller batch or a smaller model{cpu}.")
        return REFUSED
    terminal.error(
        f"{type(error).__name__}: {first}\n  This is a defect of secateur, not of the command. "
        "Run it again with --debug to see the traceback, and report that."
    )
    return DEFECT


def _has_no_reader(stop: BaseException | None) -> bool:
    """Whether a program that was to read standard output is gone: typer and rich make an exit of that error."""
    while stop is not None:
        if isinstance(stop, BrokenPipeError):
            return True
        stop = stop.__cause__ or stop.__context__
    return False


@contextmanager
def _stoppable(last: bool) -> Iterator[list[int]]:
    """SIGINT, SIGTERM and SIGHUP raise KeyboardInterrupt within the block; the list then holds the signal.

    One that follows within a second is ignored: it would interrupt the removal of temporary files.
    """
    stopped: list[int] = []
    since = [float("-inf")]

    def stop(number: int, frame: Any) -> None:
        if time.monotonic() - since[0] < _AGAIN:
            return
        since[0], stopped[:] = time.monotonic(), [number]
        raise KeyboardInterrupt

    mine = threading.current_thread() is threading.main_thread()
    numbers = [n for n in SIGNALS if mine and signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if last and stopped else handler)
