"""One model, one process: a time limit, a watch on resident memory, and one JSON line that always comes back."""

from __future__ import annotations

import json
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Limits:
    """Processor seconds and bytes of resident memory allowed to one model; wall-clock time may be five times that.

    Processor time, so that a busy machine does not turn a slow model into a failed one.
    """

    seconds: float = 300.0
    bytes: int = 10 * 2**30


def resident(pid: int) -> int:
    """Bytes of resident memory of a process; 0 when it is gone or the system has no /proc."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def processor_seconds(pid: int) -> float:
    """User and system seconds a process has used; 0 when it is gone or the system has no /proc."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def preload() -> None:
    """Import the heavy libraries once, so that every forked process starts with them."""
    from benchmarks.zoo import torchvision_models

    torchvision_models.library()
    import timm  # noqa: F401
    import transformers  # noqa: F401

    import secateur  # noqa: F401

    torch.set_num_threads(1)


def run(work: Callable[[str, Path], None], name: str, limits: Limits) -> dict[str, Any]:
    """Call `work(name, file)` in a forked process and return the JSON object it wrote to the file.

    The worker rewrites the file after every stage, so what it had found before a limit stopped it is kept. The keys
    `stopped` (why it was ended), `wall_s`, `cpu_s` and `peak_bytes` are added here.
    """
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "row.json", Path(folder) / "log.txt"
        start, used, peak, stopped = time.monotonic(), 0.0, 0, None
        pid = os.fork()
        if pid == 0:
            _child(work, name, out, log)
        status = None
        while status is None:
            done, code = os.waitpid(pid, os.WNOHANG)
            if done:
                status = os.waitstatus_to_exitcode(code)
                break
            peak = max(peak, resident(pid))
            used = processor_seconds(pid)
            if used > limits.seconds or time.monotonic() - start > 5 * limits.seconds:
                stopped = f"limit of {limits.seconds:.0f} processor seconds"
            elif peak > limits.bytes:
                stopped = f"memory limit of {limits.bytes / 2**30:.0f} GiB"
            if stopped:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                break
            time.sleep(0.02)
        row: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        if stopped is None and status != 0:
            stopped = f"exit status {status}: {log.read_text()[-500:]}"
        row["wall_s"] = round(time.monotonic() - start, 2)
        row["cpu_s"] = round(used, 2)
        row["peak_bytes"] = max(peak, row.get("peak_bytes", 0))
        if stopped:
            row["stopped"] = stopped
    return row


def _child(work: Callable[[str, Path], None], name: str, out: Path, log: Path) -> None:
    """The forked side: all output to `log`, and no way back into the caller's code."""
    code = 1
    with log.open("w") as stream:
        try:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
            work(name, out)
            code = 0
        except BaseException:  # the caller reads it from the log
            traceback.print_exc(file=stream)
        finally:
            stream.flush()
            os._exit(code)


def write(path: Path, row: dict[str, Any]) -> None:
    """Write a row so that a reader never sees half of it."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(row))
    draft.replace(path)
