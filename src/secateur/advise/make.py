"""A candidate carried out: its model, its bytes on disk, its peak memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur.advise.bench import SPARSE, Bench, Timed
from secateur.advise.candidates import INT8, PATTERNS, WEIGHTS, Candidate
from secateur.advise.int8 import RUNTIME, int8
from secateur.budget import parse
from secateur.errors import InputError
from secateur.measure import count, peak_bytes
from secateur.mend import Result
from secateur.models import load_model, save
from secateur.models.atomic import MARK, TENSORS, sha256
from secateur.pack import write_archive
from secateur.pattern import parse_pattern
from secateur.prune import How, Work, chosen
from secateur.sparsify import Sparse, sparsify
from secateur.surgery.cut import state_of


@dataclass
class Model:
    """What a candidate became. `bytes`: of the file with its numbers; `outputs` and `call`: of what is no module of torch, for every part of the
    held-out rows and in time; `folder`: its name below that of the advice."""

    module: nn.Module | None
    bytes: int
    peak_bytes: int | None = None
    macs: int | None = None
    params: int | None = None
    folder: str | None = None
    plan_sha256: str | None = None
    process_bytes: int | None = None
    outputs: list[tuple[Tensor, Tensor | None]] | None = None
    call: Callable[[], Any] | None = None
    notes: list[str] = field(default_factory=list)


class Maker:
    """Candidates of one model, from one trace and one set of statistics.

    Args:
        work: what `prune.begin` gave.
        data: all batches to calibrate with, where time allows; the rows to compare on, as batches; whether those have labels.
        inputs: (args, kwargs) that int8 is exported with. folder: where their folders go.
    """

    def __init__(self, work: Work, bench: Bench, data: tuple[Any, list[Any], bool], inputs: tuple[tuple, dict[str, Any]], folder: Path):
        self.work, self.bench, self.inputs, self.folder, self.say = work, bench, inputs, folder, work.say
        self.whole, self.held, self.labelled = data

    @cached_property
    def careful(self) -> Work:
        """The same trace, with all rows and the default settings."""
        how = How(*chosen("auto", "auto", "auto", True), self.work.how.seed, False, None, self.whole, self.work.how.ignore)
        return replace(self.work, how=how, planners={}, studies={})

    def _work(self, candidate: Candidate) -> Work:
        return self.work if candidate.quick else self.careful

    def dense(self, scratch: Path) -> Model:
        """The model itself."""
        model = self.work.model
        write_archive(_unique(state_of(model)), scratch / TENSORS)
        cost = count(model, *self.bench.inputs)
        return Model(model, (scratch / TENSORS).stat().st_size, peak_bytes(model, *self.bench.inputs), cost.macs, cost.params)

    def ready(self, candidate: Candidate) -> None:
        """Collect what all cuts are made from, where it is not there yet."""
        if candidate.command == "prune":
            _ = self._work(candidate).study(self.work.graph).curves

    def made(self, candidate: Candidate) -> Model:
        """Carry a candidate out, and save it.

        Raises:
            SecateurError: it cannot be had.
        """
        if candidate.way == INT8:
            return self._quantised(candidate)
        result = self._zeroed(candidate) if candidate.command == "mask" else self._cut(candidate)
        self.say("save")
        folder = save(result, self.folder / candidate.folder)
        cost, size = count(result.model, *self.bench.inputs), (folder / TENSORS).stat().st_size
        return Model(result.model, size, None, cost.macs, cost.params, folder.name, sha256(folder / MARK), notes=result.notes)

    def timed(self, candidate: Candidate, model: Model) -> Timed:
        """Seconds of it, on the runtime where it is quickest; fills its peak memory in."""
        if model.call is not None or model.module is None:
            assert model.call is not None
            return self.bench.calls({RUNTIME: model.call})
        if candidate.way not in (WEIGHTS, PATTERNS):
            model.peak_bytes = peak_bytes(model.module, *self.bench.inputs)
            return self.bench.model_of(model.module)
        timed, found = self.bench.zeros_of(model.module)
        model.peak_bytes = peak_bytes(found.model if found and timed.runtime == SPARSE else model.module, *self.bench.inputs)
        return timed

    def _quantised(self, candidate: Candidate) -> Model:
        model = self.work.model
        if candidate.after:
            self.say(f"load {candidate.after.name}")
            if not (self.folder / candidate.after.folder / MARK).is_file():
                raise InputError(f"int8 after {candidate.after.name} needs its model, and that row has none.\n  Give more --minutes.")
            model = load_model(str(self.folder / candidate.after.folder)).model
        data, folder = (self.work.how.data, self.held, self.labelled), self.folder / candidate.folder
        found = int8(model, self.inputs, data, self.bench.inputs, folder, self.bench.threads, self.say)
        return Model(
            None, found.bytes, folder=candidate.folder, process_bytes=found.process_bytes, outputs=found.outputs, call=found.call, notes=found.notes
        )

    def _cut(self, candidate: Candidate) -> Result:
        only, target = candidate.value("--only"), candidate.value("--at-most")
        assert target is not None
        work = self._work(candidate).but(only=[only] if only else [], depth="--depth" in candidate.options)
        return work.result([parse(target)])

    def _zeroed(self, candidate: Candidate) -> Result:
        work, pattern = self._work(candidate), candidate.value("--pattern")
        how = Sparse(
            candidate.value("--keep"), candidate.value("--by") or "auto", parse_pattern(pattern or "free"), ignore=work.how.ignore, seed=work.how.seed
        )
        study = work.study(work.graph)
        return sparsify(work.model, work.args, how, work.how.data, kwargs=work.kwargs, progress=self.say, study=study)


def _unique(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Each tensor once, as it is stored."""
    seen: dict[tuple, str] = {}
    for name, t in state.items():
        seen.setdefault((t.data_ptr(), t.shape, t.stride()) if t.numel() else (name,), name)
    with torch.no_grad():
        return {name: state[name].detach().cpu().contiguous().clone() for name in seen.values()}
