"""One model, one process: a time limit, a watch on resident memory, and one JSON line that always comes back."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Limits:
    """Wall-clock seconds and bytes of resident memory allowed to one model."""

    seconds: float = 300.0
    bytes: int = 10 * 2**30


def resident(pid: int) -> int:
    """Bytes of resident memory of a process; 0 when it is gone or the system has no /proc."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (OSError, IndexError):
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def run(module: str, arguments: list[str], limits: Limits) -> dict[str, Any]:
    """Run `python -m module *arguments FILE` and return the JSON object it wrote to FILE.

    The worker rewrites FILE after every stage, so what it had found before a limit stopped it is kept. The keys
    `stopped` (why it was ended), `wall_s` and `peak_bytes` are added here.
    """
    environment = dict(os.environ, OMP_NUM_THREADS="1", TIMM_FUSED_ATTN=os.environ.get("TIMM_FUSED_ATTN", "1"))
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT / "src"), str(ROOT), environment.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        out, log = Path(folder) / "row.json", Path(folder) / "log.txt"
        start, peak, stopped = time.monotonic(), 0, None
        with log.open("w") as stream:
            command = [sys.executable, "-m", module, *arguments, str(out)]
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=ROOT, env=environment)
            while process.poll() is None:
                peak = max(peak, resident(process.pid))
                if time.monotonic() - start > limits.seconds:
                    stopped = f"time limit of {limits.seconds:.0f} s"
                elif peak > limits.bytes:
                    stopped = f"memory limit of {limits.bytes / 2**30:.0f} GiB"
                if stopped:
                    process.kill()
                    process.wait()
                    break
                time.sleep(0.05)
        row: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
        if stopped is None and process.returncode != 0:
            stopped = f"exit status {process.returncode}: {log.read_text()[-500:]}"
        row["wall_s"] = round(time.monotonic() - start, 2)
        row["peak_bytes"] = max(peak, row.get("peak_bytes", 0))
        if stopped:
            row["stopped"] = stopped
    return row


def write(path: Path, row: dict[str, Any]) -> None:
    """Write a row so that a reader never sees half of it."""
    draft = path.with_suffix(".draft")
    draft.write_text(json.dumps(row))
    draft.replace(path)
