"""Where the command `secateur` begins. It stands beside the package: importing any part of that imports torch, which takes
seconds, and who stops the command within them gets one line as at any other time."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Any


def _stop(number: int, frame: Any) -> None:
    """Nothing is open yet, and an exception could be caught by whatever is being imported."""
    said = b"interrupted" if number == signal.SIGINT else b"terminated" if number == signal.SIGTERM else b"hung up"
    with suppress(OSError):  # the terminal may be gone
        os.write(2, b"secateur: " + said + b"\n")
    os._exit(128 + number)


def main() -> int:
    """Run one command; returns the exit code."""
    for number in [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _stop)
    from secateur.cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
