"""Run exported files in their own runtime: a script for a process of its own.

`python -P fresh.py JOB.json RESULT.json`, run by path: it imports numpy and the runtime, never secateur, so what it shows is what the
file does without us, and its memory is that of the runtime. It imports torch only for the formats that need it.

The job: `files` (each `name`, `format`, `path`, `inputs`: names in order, `auto` and `remote`: class of transformers, code of its own), `calls`
(.npz files: `rest_0`, `rest_1`, ... in order and `named_X`), `threads`, `rounds`, `least_of` (turns of a round), `shortest` (seconds of one turn).
The result: `outputs` (an .npz for each file and call), `samples` (seconds of one call, a list for each file; the files take turns), `calls` (of
one sample), `idle_bytes`, `peak_bytes` (after each call), `version`; or `error`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

Feed = dict[str, Any]  # "rest": arrays in order; "named": arrays by the name of the keyword
Bind = Callable[[Feed], Callable[[], list[np.ndarray]]]


def main(job_file: str, result_file: str) -> None:
    job = json.loads(Path(job_file).read_text())
    try:
        result = run(job, Path(result_file).parent)
    except Exception as error:  # runtimes raise many unrelated types; the caller says which file it was
        result = {"error": f"{type(error).__name__}: {error}"}
    Path(result_file).write_text(json.dumps(result))


def run(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    formats = {file["format"] for file in job["files"]}
    packages = [IMPORTS[name]() for name in sorted(formats)]
    feeds = [feed(path) for path in job["calls"]]
    idle = resident("VmRSS")
    bound = {file["name"]: FORMATS[file["format"]](file, job["threads"]) for file in job["files"]}
    outputs: dict[str, list[str]] = {name: [] for name in bound}
    peaks = []
    for index, given in enumerate(feeds):
        for name, bind in bound.items():
            path = folder / f"{name}_{index}.npz"
            np.savez(path, *[np.array(value) for value in bind(given)()])
            outputs[name].append(path.name)
        peaks.append(resident("VmHWM"))
    timed = in_turns({name: bind(feeds[0]) for name, bind in bound.items()}, job["rounds"], job["least_of"], job["shortest"]) if job["rounds"] else {}
    return {"outputs": outputs, "idle_bytes": idle, "peak_bytes": peaks, "version": ", ".join(packages), **timed}


def feed(path: str) -> Feed:
    with np.load(path, allow_pickle=False) as held:
        rest = [held[f"rest_{i}"] for i in range(sum(key.startswith("rest_") for key in held.files))]
        return {"rest": rest, "named": {key.removeprefix("named_"): held[key] for key in held.files if key.startswith("named_")}}


def in_turns(functions: dict[str, Callable[[], Any]], rounds: int, least_of: int, shortest: float) -> dict[str, Any]:
    """Seconds of one call, `rounds` samples each; every round calls each function, in an order that rotates. A sample is the least of a few:
    what other processes do only ever adds."""
    calls = {}
    for name, function in functions.items():
        function()
        function()
        calls[name] = max(1, round(shortest / max(sample(function, 1), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for turn in range(rounds):
        found: dict[str, list[float]] = {name: [] for name in names}
        for again in range(least_of):
            start = (turn + again) % len(names)
            for name in names[start:] + names[:start]:
                found[name].append(sample(functions[name], calls[name]))
        for name in names:
            samples[name].append(min(found[name]))
    return {"samples": samples, "calls": calls}


def sample(function: Callable[[], Any], calls: int) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - begin) / calls


def resident(which: str) -> int:
    """Bytes of memory that the process holds (VmRSS) or has held at most (VmHWM); 0 where the system does not say.

    Not `getrusage`: its maximum starts at what the parent held when it started this process.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(which + ":")), 0)


def by_name(given: Feed, names: list[str]) -> dict[str, np.ndarray]:
    """The arrays by the names of the file's inputs: keywords by their own, the others in order."""
    named = {name: given["named"][name] for name in names if name in given["named"]}
    rest = [*given["rest"], *(value for key, value in given["named"].items() if key not in named)]
    free = [name for name in names if name not in named]
    if len(free) != len(rest):
        raise ValueError(f"the file takes {len(names)} inputs ({', '.join(names)}) and was given {len(named) + len(rest)}")
    return named | dict(zip(free, rest, strict=True))


# ---------------------------------------------------------------- one function for each format: open a file, bind it to inputs
def onnx(file: dict[str, Any], threads: int) -> Bind:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 3
    options.add_session_config_entry("session.force_spinning_stop", "1")  # waiting threads would take the time of the others
    session = ort.InferenceSession(file["path"], options, providers=["CPUExecutionProvider"])
    names = [held.name for held in session.get_inputs()]

    def bind(given: Feed) -> Callable[[], list[np.ndarray]]:
        values = by_name(given, names)
        return lambda: session.run(None, values)

    return bind


def openvino(file: dict[str, Any], threads: int) -> Bind:
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY", "ENABLE_CPU_PINNING": False,
        "INFERENCE_PRECISION_HINT": "f32",  # else bfloat16 where the processor has it
    }  # fmt: skip
    compiled = ov.Core().compile_model(file["path"], "CPU", settings)
    request = compiled.create_infer_request()
    names = [port.get_any_name() for port in compiled.inputs]

    def bind(given: Feed) -> Callable[[], list[np.ndarray]]:
        values = by_name(given, names)
        ordered = {index: values[name] for index, name in enumerate(names)}

        def call() -> list[np.ndarray]:
            found = request.infer(ordered, share_inputs=True, share_outputs=True)
            return [found[port] for port in compiled.outputs]

        return call

    return bind


def executorch(file: dict[str, Any], threads: int) -> Bind:
    import torch
    from executorch.extension.pybindings.portable_lib import _unsafe_reset_threadpool
    from executorch.runtime import Runtime

    torch.set_num_threads(threads)
    _unsafe_reset_threadpool(threads)
    program = Runtime.get().load_program(file["path"])
    method = program.load_method("forward")
    if method is None:
        raise ValueError("the file has no method forward")

    def bind(given: Feed) -> Callable[[], list[np.ndarray]]:
        values = [torch.from_numpy(value) for value in by_name(given, file["inputs"]).values()]
        return lambda: [value.numpy() for value in method.execute(values) if isinstance(value, torch.Tensor)]

    return bind


def pt2(file: dict[str, Any], threads: int) -> Bind:
    import torch

    torch.set_num_threads(threads)
    program = torch.export.load(file["path"])
    module = program.module()
    args, kwargs = program.example_inputs or ((), {})
    return in_torch(module, args, kwargs)


def hf(file: dict[str, Any], threads: int) -> Bind:
    import torch

    transformers = import_transformers()
    torch.set_num_threads(threads)
    auto = getattr(transformers, file["auto"])
    model = auto.from_pretrained(file["path"], local_files_only=True, trust_remote_code=bool(file["remote"])).eval()
    for part in (model.config, getattr(model.config, "text_config", None)):
        if part is not None and getattr(part, "use_cache", None):
            part.use_cache = False  # what was pruned ran without a cache of keys and values
    return in_torch(model, (), {})


def in_torch(module: Any, args: tuple, kwargs: dict[str, Any]) -> Bind:
    """`args` and `kwargs` say how inputs are nested; without them arrays are passed flat."""
    import torch
    from torch.utils._pytree import tree_leaves, tree_map_only

    def bind(given: Feed) -> Callable[[], list[np.ndarray]]:
        rest = iter(torch.from_numpy(value) for value in given["rest"])
        named = {key: torch.from_numpy(value) for key, value in given["named"].items()}
        nested = tree_map_only(torch.Tensor, lambda _: next(rest), (args, {k: v for k, v in kwargs.items() if k not in named}))
        positional = (*nested[0], *rest)

        def call() -> list[np.ndarray]:
            with torch.no_grad():
                found = module(*positional, **nested[1], **named)
            return [leaf.numpy() for leaf in tree_leaves(found) if isinstance(leaf, torch.Tensor)]

        return call

    return bind


def import_transformers() -> Any:
    """transformers, also where torchvision is installed for another torch: its import then lacks two operators."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pass
    except RuntimeError:
        import torch

        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


def imported(*names: str) -> Callable[[], str]:
    """A function that imports packages and says which version the first of them has."""

    def load() -> str:
        for name in names:
            __import__(name)
        return f"{names[0].partition('.')[0]} {version(names[0].partition('.')[0])}"

    return load


def transformers_ready() -> str:
    return f"transformers {import_transformers().__version__}, torch {version('torch')}"


IMPORTS: dict[str, Callable[[], str]] = {
    "onnx": imported("onnxruntime"), "openvino": imported("openvino"), "executorch": imported("executorch.runtime", "torch"),
    "pt2": imported("torch"), "hf": transformers_ready,
}  # fmt: skip
FORMATS: dict[str, Callable[[dict[str, Any], int], Bind]] = {
    "onnx": onnx, "openvino": openvino, "executorch": executorch, "pt2": pt2, "hf": hf,
}  # fmt: skip

if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
