"""Exported files run in a process of their own: what they give, how long they take, how much memory that needs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils._pytree import tree_leaves

from secateur.errors import InputError, ModelError
from secateur.measure.latency import Comparison, Latency, compared
from secateur.measure.run import batch_of

CHILD = Path(__file__).parent / "fresh.py"
SUFFIXES = {".onnx": "onnx", ".xml": "openvino", ".pte": "executorch", ".pt2": "pt2"}
RUNTIMES = {"onnx": "onnxruntime", "openvino": "openvino", "executorch": "executorch", "pt2": "torch", "hf": "transformers"}
_LEAST_OF, _SHORTEST = 5, 5e-4  # turns of a round, of which the least counts, and seconds of one: as in measure.latency
_PATIENCE = 3600.0  # seconds; a file that runs longer than that on a handful of inputs hangs


Call = tuple[tuple, Mapping[str, Any]]  # positional and keyword inputs, as the model is called


@dataclass(frozen=True)
class File:
    """A file, or a Hugging Face folder, and what its runtime has to be told.

    Attributes:
        path: of the file; of OpenVINO's two the .xml.
        format: onnx, openvino, executorch, pt2 or hf.
        inputs: names in order, for ExecuTorch, whose files do not carry them.
        auto, remote: class of transformers that loads a Hugging Face folder, and whether code of the folder's own is needed.
    """

    path: Path
    format: str
    inputs: tuple[str, ...] = ()
    auto: str = ""
    remote: bool = False

    @classmethod
    def of(cls, path: str | Path) -> File:
        """What an .onnx, .xml or .pt2 file is, by its suffix. Raises InputError for another one."""
        path = Path(path)
        if path.suffix not in SUFFIXES or path.suffix == ".pte":
            raise InputError(f"{path} is no .onnx, .xml or .pt2 file.\n  Say what it is: File(path, format, inputs).")
        return cls(path, SUFFIXES[path.suffix])


@dataclass(frozen=True)
class Run:
    """What one process found.

    Attributes:
        outputs: for every call the output tensors in order.
        seconds: of the first call, None where it was not timed.
        peak_bytes: most memory the process held until the first call was done, runtime included; 0: not known.
        idle_bytes: what it held before the file was opened.
        version: of the runtime.
    """

    outputs: list[list[np.ndarray]]
    seconds: Latency | None
    peak_bytes: int
    idle_bytes: int
    version: str


def run(file: File | str | Path, calls: Sequence[Call], *, threads: int = 1, rounds: int = 0) -> Run:
    """Run a file in a fresh process on every call; with `rounds` (2 or more) time the first call as well.

    Args:
        file: a `File`, or the path of an .onnx, .xml or .pt2 file.
        calls: inputs, `(args, kwargs)` each, as the model is called: `[((x,), {}), ...]`. Keywords are matched by name, the rest by order.
        threads: of one operator.

    Raises:
        ModelError: the runtime cannot open or run the file; the message is its own.
        InputError: no calls, a tensor that numpy cannot hold (bfloat16), or one round.
    """
    file = file if isinstance(file, File) else File.of(file)
    with TemporaryDirectory(prefix="secateur-run-", ignore_cleanup_errors=True) as folder:
        found = _child(Path(folder), {"file": file}, calls, threads, rounds)
        outputs = [_arrays(Path(folder) / path) for path in found["outputs"]["file"]]
    seconds = compared(found["samples"], found["calls"], threads=threads, batch=batch_of(*calls[0])).seconds["file"] if rounds else None
    return Run(outputs, seconds, found["peak_bytes"][0], found["idle_bytes"], found["version"])


def race(files: Mapping[str, File | str | Path], call: Call, *, threads: int = 1, rounds: int = 20) -> Comparison:
    """Time files of one runtime or several on the same inputs, in turns in one fresh process. The first is the yardstick.

    Raises: as `run`.
    """
    known = {name: file if isinstance(file, File) else File.of(file) for name, file in files.items()}
    if not known or rounds < 2:
        raise InputError(f"race() got {len(known)} files and {rounds} rounds.\n  It takes one file and 2 rounds at least.")
    with TemporaryDirectory(prefix="secateur-run-", ignore_cleanup_errors=True) as folder:
        found = _child(Path(folder), known, [call], threads, rounds)
    return compared(found["samples"], found["calls"], threads=threads, batch=batch_of(*call))


def _child(folder: Path, files: Mapping[str, File], calls: Sequence[Call], threads: int, rounds: int) -> dict[str, Any]:
    if not calls or rounds == 1:
        raise InputError(f"{len(calls)} calls, {rounds} rounds: a file runs on one call at least, and is timed in 2 rounds or not at all.")
    paths = [_write(folder / f"call_{index}.npz", call) for index, call in enumerate(calls)]
    job = {
        "files": [{**asdict(file), "name": name, "path": str(file.path.absolute())} for name, file in files.items()],
        "calls": paths, "threads": threads, "rounds": rounds, "least_of": _LEAST_OF, "shortest": _SHORTEST,
    }  # fmt: skip
    (folder / "job.json").write_text(json.dumps(job))
    surroundings = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(folder / "modules"), "OMP_NUM_THREADS": str(threads)}
    what = " and ".join(f"{file.path.name} ({RUNTIMES[file.format]})" for file in files.values())
    try:
        # -P: the script's own folder is not searched for modules
        command = [sys.executable, "-P", str(CHILD), "job.json", "result.json"]
        done = subprocess.run(command, cwd=folder, env=surroundings, capture_output=True, text=True, errors="replace", timeout=_PATIENCE)
    except subprocess.TimeoutExpired as error:
        raise ModelError(f"{what} did not finish within {_PATIENCE:.0f} s.\n  Use fewer rounds, or smaller inputs.") from error
    result = folder / "result.json"
    found = json.loads(result.read_text()) if result.is_file() else {"error": _died(done)}
    if "error" in found:
        raise ModelError(f"{what} does not run in a process of its own: {found['error'][:600]}\n  Nothing was kept of it. {_tail(done)}".rstrip())
    return found


def _write(path: Path, call: Call) -> str:
    args, kwargs = call
    named = {f"named_{name}": value for name, value in kwargs.items() if isinstance(value, Tensor)}
    rest = [leaf for leaf in tree_leaves((args, {k: v for k, v in kwargs.items() if not isinstance(v, Tensor)})) if isinstance(leaf, Tensor)]
    held: dict[str, Tensor] = {**{f"rest_{index}": leaf for index, leaf in enumerate(rest)}, **named}
    try:
        arrays: dict[str, Any] = {name: value.detach().cpu().contiguous().numpy() for name, value in held.items()}
        np.savez(path, **arrays)
    except TypeError as error:
        raise InputError(f"an input cannot be handed to another process: {error}.\n  Convert it: x.float().") from error
    return path.name


def _arrays(path: Path) -> list[np.ndarray]:
    with np.load(path, allow_pickle=False) as held:
        return [held[f"arr_{index}"] for index in range(len(held.files))]


def _died(done: subprocess.CompletedProcess[str]) -> str:
    if done.returncode < 0:
        return f"the process was ended by {signal.Signals(-done.returncode).name}"
    return f"the process ended with code {done.returncode}"


def _tail(done: subprocess.CompletedProcess[str]) -> str:
    """What the runtime itself printed last: its C++ says more than its exception."""
    lines = [line for line in (done.stderr or "").splitlines() if line.strip() and "Warning" not in line]
    return f"It printed: {' | '.join(lines[-3:])[:400]}" if lines else ""
