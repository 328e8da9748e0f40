"""`python -m benchmarks.export [--network NAME ...] [--format NAME ...] [--rounds 20] [--again]`: halved networks in other runtimes.

Every network is cut to half of its multiply-accumulates with the cheapest scores (L2, no repair: nothing here depends on accuracy), exported
to every format that applies, run in a fresh process on several batch sizes, compared with torch, and timed beside the dense network exported
the same way: batch of one, one thread, rounds in turns. Rows that `results/export.json` has are left alone; `--again` measures them anew.

Ways of cutting: `uniform`, the same share everywhere; `16`, widths in multiples of 16 channels, which is the block that ONNX Runtime pads
convolutions to with AVX-512 (8 with AVX2); `16, blocks`, where whole residual blocks may go too: a stage of 16 channels has nothing else to
give there; `blocks`, whole blocks alone; `inner`, heads and hidden neurons alone, the
same share everywhere, as a plain configuration can say. ONNX is measured for every way, the other formats for the last one of a network.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import secateur as sc
from benchmarks.no_training.__main__ import versions
from benchmarks.no_training.tasks import TASKS
from benchmarks.no_training.texts import example, model_folder
from benchmarks.sparse_models import resnet50
from secateur import export, score
from secateur.budget.align import align
from secateur.models import load_data
from secateur.models.digits import trained_digits_net
from secateur.models.hf import import_transformers
from secateur.report.hardware import hardware

RESULTS = Path(__file__).parent / "results" / "export.json"
HALF = 0.5
AIM = {"resnet56": 1.6, "resnet50": 1.6}  # times as fast as dense, ONNX Runtime, batch of one, one thread
ROUGH = 7  # halvings of the budget to plan with until the aligned plan is just below half

Inputs = tuple[tuple, dict[str, Tensor]]


@dataclass(frozen=True)
class Network:
    """`build` gives the dense network and two rows of inputs; `ways` the cuts, the last of which goes to every format."""

    build: Callable[[], tuple[nn.Module, Inputs]]
    ways: tuple[str, ...] = ("uniform",)
    formats: tuple[str, ...] = ("onnx", "openvino", "executorch", "pt2")


def digits() -> tuple[nn.Module, Inputs]:
    data = load_data("digits")
    return trained_digits_net(data), (data.example(2)[0], {})


def resnet56() -> tuple[nn.Module, Inputs]:
    return TASKS["resnet56"].dense(), ((TASKS["resnet56"].calibrate(0)[0][0][:2],), {})


def the_resnet50() -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    model, shape = resnet50()
    return model.eval(), ((torch.randn(2, *shape[1:]),), {})


def minilm() -> tuple[nn.Module, Inputs]:
    """With the pooling layer that its configuration builds: a Hugging Face folder holds what that says."""
    model = import_transformers().AutoModel.from_pretrained(str(model_folder())).eval()
    return model, ((), {"input_ids": example()[:2]})


def llama() -> tuple[nn.Module, Inputs]:
    transformers = import_transformers()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, head_dim=32,
        max_position_embeddings=256, use_cache=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval(), ((), {"input_ids": torch.randint(3, 2048, (2, 64))})


FOR_HF = ("onnx", "openvino", "executorch", "pt2", "hf")
NETWORKS = {
    "digits": Network(digits),
    "resnet56": Network(resnet56, ("uniform", "blocks", "16, blocks")),
    "resnet50": Network(the_resnet50, ("uniform", "16")),
    "minilm": Network(minilm, formats=FOR_HF),
    "llama": Network(llama, ("inner",), FOR_HF),
}


class Cuts:
    """The cuts of one network, from one trace."""

    def __init__(self, model: nn.Module, inputs: Inputs):
        self.model = model
        self.graph = sc.trace(model, *inputs)
        self.widths = score.score(self.graph, model, "l2", 0)
        self.depth = score.blocks(self.graph, model)
        self.half = int(HALF * self.graph.cost().macs)

    def of(self, way: str) -> tuple[sc.Plan, nn.Module]:
        plan = self.plan(way)
        return plan, sc.cut(self.model, self.graph, plan).model.eval()

    def plan(self, way: str) -> sc.Plan:
        if way == "uniform":
            return self._planned(self.widths, HALF, "uniform")
        if way == "inner":  # not the stream, and not the channels of a head
            stays = ("o_proj:out", "q_proj:out.2", "value_dim")
            scores = {n: torch.full_like(s, torch.inf) if n.endswith(stays) else s for n, s in self.widths.items()}
            return self._planned(scores, HALF, "uniform")
        if way == "blocks":
            return self._planned({**{n: torch.full_like(s, torch.inf) for n, s in self.widths.items()}, **self.depth}, HALF)
        scores = {**self.widths, **self.depth} if "blocks" in way else self.widths
        low, high, best = 0.1, 0.75, None
        for _ in range(ROUGH):
            middle = (low + high) / 2
            plan = align(self.graph, self._planned(scores, middle), scores, 16)
            if plan.after.macs <= self.half:
                low, best = middle, plan
            else:
                high = middle
        if best is None:
            raise sc.SecateurError(f"no plan of widths in multiples of 16 has half of the multiply-accumulates ({way})")
        return best

    def _planned(self, scores: dict[str, Tensor], share: float, allocation: str = "global") -> sc.Plan:
        return sc.plan(self.graph, scores, sc.MACs(at_most=f"{100 * share:.3f}%"), allocation=allocation)


def one_row(network: str, way: str, format: str, sides: tuple[nn.Module, nn.Module, sc.Plan], inputs: Inputs, rounds: int) -> dict[str, Any]:
    dense, pruned, plan = sides
    row = {"network": network, "way": way, "format": format, "macs_share": plan.after.macs / plan.before.macs,
           "params_share": plan.after.params / plan.before.params}  # fmt: skip
    args, kwargs = inputs
    first = tuple(t[:1] for t in args), {name: t[:1] for name, t in kwargs.items()}
    with tempfile.TemporaryDirectory() as folder:
        try:
            how = export.How(rounds=rounds, batches=(2, 5))
            done = export.to(format, pruned, first, Path(folder) / "to", dense=dense, how=how)
        except sc.SecateurError as error:
            return {**row, "error": str(error).splitlines()[0].replace(folder, "")}
    timed = done.seconds
    assert timed is not None
    row |= {
        "runtime": done.runtime, "dynamic": done.dynamic, "batches": [r.batch for r in done.deviations], "deviation": done.deviation,
        "deviation_absolute": max(r.absolute for r in done.deviations), "bytes": done.bytes, "dense_bytes": done.dense_bytes,
        "peak_bytes": dict(done.peak_bytes), "idle_bytes": done.idle_bytes, "notes": done.notes,
    }  # fmt: skip
    if "dense" in timed.seconds:
        row |= {f"{side}_s": timed.seconds[side].median for side in ("dense", "pruned")}
        row |= {"speedup": 1 / timed.ratio["pruned"], "ratio_spread": timed.ratio_spread["pruned"], "rounds": rounds}
    return {**row, "load_average": list(os.getloadavg()[:2])}


def wanted(options: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    for name in options.network:
        held = NETWORKS[name]
        for way in held.ways:
            formats = held.formats if way == held.ways[-1] else ("onnx",)
            yield from ((name, way, format) for format in formats if format in options.format)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--format", nargs="+", default=list(export.NAMES), choices=list(export.NAMES))
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    if RESULTS.exists():
        rows = {(r["network"], r["way"], r["format"]): r for r in json.loads(RESULTS.read_text())["rows"]}
    dense, inputs, cuts, made = None, None, None, ("", "")
    for key in wanted(options):
        name, way, format = key
        if key in rows and not options.again:
            continue
        if made[0] != name:
            dense, inputs = NETWORKS[name].build()
            cuts = Cuts(dense, inputs)
        if made != (name, way):
            try:
                plan, pruned = cuts.of(way)
            except sc.SecateurError as error:
                rows[key], made = {"network": name, "way": way, "format": format, "error": str(error)}, (name, "")
                write(rows)
                continue
            made = (name, way)
        rows[key] = one_row(name, way, format, (dense, pruned, plan), inputs, options.rounds)
        print(json.dumps(rows[key]), flush=True)
        write(rows)


def write(rows: dict[tuple[str, ...], dict[str, Any]]) -> None:
    order = [(name, way, format) for name, held in NETWORKS.items() for way in held.ways for format in export.NAMES]
    facts = {"macs": HALF, "score": "l2", "repair": "none", "batch": 1, "threads": 1, "aim": AIM, "versions": versions(), "hardware": hardware()}
    fresh = RESULTS.with_suffix(".json.new")
    fresh.write_text(json.dumps({**facts, "rows": [rows[key] for key in order if key in rows]}, indent=1) + "\n")
    fresh.replace(RESULTS)


if __name__ == "__main__":
    main()
