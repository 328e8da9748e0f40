"""`python -m benchmarks.kernels [--threads 1 2] [--rounds 15] [--shape NAME ...]`: sparse layers beside dense ones, shape by shape.

All ways to compute a layer are timed in turns in one process: dense with torch (as it lies, and channels last), torch.compile and ONNX
Runtime; sparse at 50, 70, 90 and 95 % of zeros, single weights and blocks of 4 outputs; torch's CSR and scipy's at the same zeros.
`results/kernels.json` has medians in seconds, and the speed-up over the quickest dense way.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import threads
from secateur.runtime import sparse
from secateur.runtime.convert import in_turns

RESULTS = Path(__file__).parent / "results" / "kernels.json"
ZEROS = (0.5, 0.7, 0.9, 0.95)
PATTERNS = {"single": 1, "4x1": 4}
BARS = {"single": (1.1, 1.8, 4.5, 7.5), "4x1": (1.7, 2.8, 7.5, 13.0)}
Shape = tuple[Callable[[], nn.Module], tuple[int, ...]]


def linear(rows: int, columns: int, tokens: int) -> Shape:
    return lambda: nn.Linear(columns, rows), (tokens, columns)


def conv(channels: int, filters: int, size: int, kernel: int = 1, stride: int = 1) -> Shape:
    return lambda: nn.Conv2d(channels, filters, kernel, stride, kernel // 2), (1, channels, size, size)


SHAPES: dict[str, Shape] = {
    "linear 512x512x128": linear(512, 512, 128), "linear 768x768x128 (BERT-base)": linear(768, 768, 128),
    "linear 3072x768x128 (BERT-base)": linear(3072, 768, 128), "linear 768x3072x128 (BERT-base)": linear(768, 3072, 128),
    "linear 4096x4096x128": linear(4096, 4096, 128),
    "1x1 256->512, 28x28": conv(256, 512, 28), "1x1 128->128, 56x56": conv(128, 128, 56), "1x1 64->256, 56x56 (ResNet-50)": conv(64, 256, 56),
    "1x1 512->128, 28x28 (ResNet-50)": conv(512, 128, 28), "1x1 1024->256, 14x14 (ResNet-50)": conv(1024, 256, 14),
    "1x1 256->1024, 14x14 (ResNet-50)": conv(256, 1024, 14), "1x1 2048->512, 7x7 (ResNet-50)": conv(2048, 512, 7),
    "1x1 64->384, 14x14 (MobileNet-V2)": conv(64, 384, 14), "1x1 960->160, 7x7 (MobileNet-V2)": conv(960, 160, 7),
    "3x3 64->64, 56x56": conv(64, 64, 56, 3), "3x3 128->128, 28x28": conv(128, 128, 28, 3), "3x3 256->256, 14x14": conv(256, 256, 14, 3),
    "3x3 512->512, 7x7": conv(512, 512, 7, 3), "3x3 128->128, 56x56, stride 2 (ResNet-50)": conv(128, 128, 56, 3, 2),
}  # fmt: skip


def pruned(layer: nn.Module, zeros: float, r: int) -> nn.Module:
    """Exactly so many blocks of r outputs are zero, anywhere."""
    w = layer.get_parameter("weight").detach()
    units = torch.zeros(len(w) // r * w[0].numel())
    units[torch.randperm(len(units))[: round(len(units) * (1 - zeros))]] = 1
    with torch.no_grad():
        w.mul_(units.view(len(w) // r, *w.shape[1:]).repeat_interleave(r, 0))
    return layer


def dense_ways(layer: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    ways: dict[str, Callable[[], Any]] = {"torch": lambda: layer(x)}
    if x.dim() == 4:
        turned, there = nn.Module(), x.to(memory_format=torch.channels_last)
        turned = pruned(type(layer)(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding), 0.0, 1)  # type: ignore[call-arg]
        turned.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        ways["torch, channels last"] = lambda: turned(there)
    compiled = torch.compile(layer)
    ways["torch.compile"] = lambda: compiled(x)
    ways["ONNX Runtime"] = onnx_way(layer, x)
    return ways


def onnx_way(layer: nn.Module, x: Tensor) -> Callable[[], Any]:
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/layer.onnx"
        torch.onnx.export(layer, (x,), path, dynamo=True, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return lambda: session.run(None, feed)


def pause() -> None:
    """After ONNX Runtime, whose threads keep looking for work for a while when they have done theirs: what comes next would share a core. Other
    work in the meantime, since a core that sleeps is slow to wake."""
    end = time.perf_counter() + 0.05
    while time.perf_counter() < end:
        torch.ones(64, 64) @ torch.ones(64, 64)


def csr_ways(layer: nn.Module, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Of a linear layer or a 1x1 convolution, its input turned beforehand."""
    import scipy.sparse

    w = layer.get_parameter("weight").detach()
    if w[0, 0].numel() > 1:
        return {}
    columns = x.t().contiguous() if x.dim() == 2 else x[0].flatten(1).contiguous()
    csr, theirs = w.flatten(1).to_sparse_csr(), scipy.sparse.csr_matrix(w.flatten(1).numpy())
    return {"torch CSR": lambda: csr @ columns, "scipy CSR": lambda: theirs @ columns.numpy()}


def measured(name: str, rounds: int) -> list[dict[str, Any]]:
    make, shape = SHAPES[name]
    torch.manual_seed(0)
    x = torch.randn(shape)
    torch._dynamo.reset()  # a limit of recompilations is for one process
    calls: dict[tuple[str, str, float], Callable[[], Any]] = {("dense", way, 0.0): call for way, call in dense_ways(make(), x).items()}
    calls["pause", "", 0.0] = pause
    others: dict[tuple[str, str, float], Callable[[], Any]] = {}
    for pattern, r in PATTERNS.items():
        for zeros in ZEROS:
            layer = pruned(make(), zeros, r)
            fast = sparse(layer, r)
            torch.testing.assert_close(fast(x), layer(x), rtol=1e-3, atol=1e-3)
            calls["sparse", pattern, zeros] = lambda f=fast: f(x)
            if pattern == "single":
                others |= {("sparse", way, zeros): call for way, call in csr_ways(layer, x).items()}
    calls |= others
    times = dict(zip(calls, in_turns(list(calls.values()), rounds), strict=True))
    times.pop(("pause", "", 0.0))
    best = min(t for (kind, _, _), t in times.items() if kind == "dense")
    columns = x[0].numel() // x.shape[1] if x.dim() == 4 else x.shape[0]
    same = {"shape": name, "columns": columns}
    rows = [{**same, "way": way, "zeros": zeros, "seconds": t, "speedup": best / t} for (_, way, zeros), t in times.items()]
    print(name, {f"{r['way']} {r['zeros']}": round(r["speedup"], 2) for r in rows if r["way"] in PATTERNS}, flush=True)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians over the shapes with at least 128 columns, beside what was aimed at."""
    found = []
    for pattern, bars in BARS.items():
        for zeros, bar in zip(ZEROS, bars, strict=True):
            ups = [r["speedup"] for r in rows if r["way"] == pattern and r["zeros"] == zeros and r["columns"] >= 128]
            if ups:
                found.append({"pattern": pattern, "zeros": zeros, "median_speedup": statistics.median(ups), "least": min(ups), "aim": bar})
    return found


def main() -> None:
    given = threads.options(__doc__, 15, shape={"nargs": "+", "default": list(SHAPES), "choices": list(SHAPES)})

    def rows() -> dict[str, Any]:
        found = [row for name in given.shape for row in measured(name, given.rounds)]
        for row in summary(found):
            print(torch.get_num_threads(), row, flush=True)
        return {"summary": summary(found), "rows": found}

    with torch.inference_mode():
        threads.measured(RESULTS, given, rows)


if __name__ == "__main__":
    main()
