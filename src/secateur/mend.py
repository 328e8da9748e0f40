"""What `prune` hands back, and its repair from data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from secateur.calibrate import Anew, Reread, batches, many_times, taken
from secateur.errors import DataError, InputError, ProofError
from secateur.masks import Asked, LayerMask, Means, solved, wrong_zeros
from secateur.measure.proof import Proof, require
from secateur.pattern import of_kernel, parse_pattern
from secateur.plan import Cost, Plan
from secateur.processes import Alone, digest, of
from secateur.repair import FITTED, HOW, LayerRepair, Study, changed, proven, put_into
from secateur.repair.apply import like_dense
from secateur.repair.batch_norm import batch_norm_statistics
from secateur.surgery import Cut
from secateur.surgery.cut import state_of
from secateur.surgery.optimizer import migrate
from secateur.trace import Graph, analyse
from secateur.trace.capture import capture

Progress = Callable[[str], None]


@dataclass
class Result:
    """What `prune` hands back.

    Attributes:
        model: the smaller model, in eval mode; an ordinary `nn.Module`.
        plan: who stayed, and why.
        proof: how far the cut model is from the masked original, before any repair.
        before, after: cost counted on the dense and on the cut model.
        graph: the trace of the dense model.
        cut: how the cut was made.
        notes: what the user should know (ops without a rule, a graph handed back, ...).
        repairs: what became of every layer in a least-squares repair, with its errors.
        study: statistics of the dense model on the data, from which other budgets can be planned.
        masks: what became of every layer whose single weights were pruned.
    """

    model: nn.Module
    plan: Plan
    proof: Proof
    before: Cost
    after: Cost
    graph: Graph
    cut: Cut
    notes: list[str] = field(default_factory=list)
    dense: nn.Module | None = field(default=None, repr=False)
    repairs: list[LayerRepair] = field(default_factory=list)
    study: Study | None = field(default=None, repr=False)
    masks: list[LayerMask] = field(default_factory=list)

    def migrate(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """An optimizer of the same class for the cut model: same settings, its state (momentum ...) cut alike."""
        if self.dense is None:
            raise InputError("this result was loaded from a folder: the dense model that the optimizer belongs to is not known.")
        return migrate(optimizer, self.dense, self.model, self.cut)


def mend(result: Result, data: Iterable[Any], repair: str = "gauss_newton", say: Progress | None = None) -> Result:
    """Repair a cut model in place, and prove it again.

    Args:
        result: what `prune(..., repair="none")` gave, in this process.
        data: calibration batches; not read again where the result already holds a study of this very object. Of
            `secateur.processes.Shared(data)` each of several processes runs its share; all end with the same weights.
        repair: "gauss_newton", "least_squares", "bias", "batch_norm" or "none".

    Returns the same result; `repairs` and `plan.why["repair"]` say what was done. Where least squares cannot be had, the
    BatchNorm statistics are re-estimated, and a note says so.

    Raises:
        InputError: an unknown repair.
        DataError: data that does not fit the model.
        ProofError: the repaired model is not the masked original with the repaired weights; the model is then as it was cut.
        ProcessError: processes that share the data went apart.
    """
    say = say or (lambda stage: None)
    if repair not in HOW:
        raise InputError(f"unknown repair {repair!r}.\n  There are: {', '.join(HOW)}.")
    if result.plan.weights and repair == "bias":
        raise InputError("repair='bias' is for cuts.\n  After masks use 'least_squares' or 'batch_norm'.")
    with of(data).watched():
        return agreed(_mended(result, data, repair, say), of(data))


def agreed(result: Result, processes: Alone) -> Result:
    """The result, which is the same in all processes to the bit.

    Raises:
        ProcessError: it is not.
    """
    if processes.world > 1:
        plan = result.plan
        masks = {f"{kind} {n}": m for kind, some in (("keep", plan.keep), ("stays", plan.weights or {})) for n, m in some.items()}
        processes.same("the plan or the weights", digest({**masks, **state_of(result.model)}), (
            "Nothing is returned. Give all processes the same model, options, versions and number of threads, on the same kind of machine."
        ))  # fmt: skip
        why = processes.fact("why", dict(plan.why))  # seconds that were measured are those of process 0
        result.plan = replace(plan, why=why) if processes.rank else plan
    return result


def _mended(result: Result, data: Iterable[Any], repair: str, say: Progress) -> Result:
    args, kwargs = result.graph.program.example_inputs
    held = result.study.data if result.study is not None else None
    data = held if isinstance(held, Reread) and held.items is data else many_times(data)
    refused = ""
    if repair in FITTED:
        try:
            with of(data).watched():  # what all processes refuse is repaired another way in all of them
                return _fitted(result, data, repair, say)
        except (DataError, InputError) as error:
            refused = str(error).splitlines()[0]
    used, kept = 0, list[str]()
    if repair != "none":
        say("BatchNorm statistics")
        calls = Anew(lambda: ((a, taken(k, kwargs)) for a, k in batches(data, args, kwargs)))
        dense = like_dense(result.dense, result.graph, result.plan.keep)
        used = batch_norm_statistics(result.model, calls, of(data), dense)
        kept = [name.removesuffix(".running_mean") for name in dense.kept] if dense else []
        if used and dense is None:
            result.notes.append("batch norms have the statistics of these data alone, which are not those of training: the dense model is not known")
    if kept:
        more = f" and {len(kept) - 4} more" if len(kept) > 4 else ""
        result.notes.append(f"batch norms that keep their statistics, since they see other values than in the dense model (with a block that went, "
                            f"or over positions that were cut): {', '.join(kept[:4])}{more}")  # fmt: skip
    if refused:
        without = "nor BatchNorm re-estimated" if kept else "and there is no BatchNorm to re-estimate"
        instead = "BatchNorm re-estimated instead" if used else without
        result.notes.append(f"not repaired by {'biases' if repair == 'bias' else 'least squares'}, {instead}: {refused}")
    result.plan = replace(result.plan, why={**result.plan.why, "repair": "batch_norm" if used else "none"})
    return result


def _fitted(result: Result, data: Iterable[Any], repair: str, say: Progress) -> Result:
    dense, graph, keep = result.dense, result.graph, result.plan.keep
    if dense is None:
        raise InputError("this result was loaded from a folder: the dense model is not known.\n  Repair it where it was cut.")
    study = result.study
    if study is None or study.data is not data:
        study = study_of(dense, graph, data, result.plan.why.get("seed", 0), say)
    if result.plan.weights:
        asked = {n: Asked(of_kernel(parse_pattern(result.plan.patterns[n]), m[0, 0].numel()), stays=m) for n, m in result.plan.weights.items()}
        network = solved(study, asked, Means(None), study.seed, say)
        state, rows, result.masks = network.state, network.rows, [m for m in network.masks_of if f"{m.layer}.weight" in asked or m.layer in asked]
    else:
        state, rows = study.repaired(keep, how=repair)
    new = changed(dense, graph, state)
    again = result.plan.why.get("repair", "none") != "none"  # what an earlier repair changed goes back to the dense model's
    written = {n: t for n, t in state.items() if n in new or (again and n in graph.tensors and t.is_floating_point())}
    before = {n: t.detach().clone() for n, t in state_of(result.model).items()}
    say("prove the repair")
    try:
        put_into(result.model, graph, keep, written)
        require(proven(dense, graph, keep, result.model, new), f"{type(dense).__name__}, repaired")
        if wrong := wrong_zeros(state_of(result.model), result.plan.weights):
            raise ProofError(f"{wrong[0]}.\n  Nothing was changed. This is a fault of secateur: please report the model.")
    except BaseException:  # an interrupt too leaves the model as it was cut
        with torch.no_grad():
            for name, tensor in state_of(result.model).items():
                tensor.copy_(before[name])
        raise
    if (filled := _filled(study, state)) and not result.plan.weights:
        result.notes.append(f"{filled:,} weights that were exactly zero are not any more: the repair fits every weight; mask after the cut")
    if (left := study.chunks.left_out) >= study.chunks.rows // len(study.chunks.feeds):  # more than what is over of whole chunks
        result.notes.append(f"{left} rows of data were left out of the repair: their shapes are not those of the first batch")
    result.repairs, result.study = rows, study
    done = "least_squares" if result.masks else repair
    result.plan = replace(result.plan, why={**result.plan.why, "repair": done, "calibration_rows": study.chunks.rows})
    return result


def study_of(model: nn.Module, graph: Graph, data: Iterable[Any], seed: int = 0, say: Progress | None = None) -> Study:
    """Statistics of a traced model on calibration data, computed when they are asked for and then kept.

    Raises:
        InputError: the model is not on the CPU.
    """
    if other := next((t.device for t in state_of(model).values() if t.device.type != "cpu"), None):
        raise InputError(f"the model is on {other}, and statistics for plans and repairs are computed on the CPU.\n"
                         "  Move it there for that: model.cpu(), and the inputs too; or prune without data.")  # fmt: skip

    def again(args: tuple, kwargs: Mapping[str, Any]) -> Graph:
        return analyse(capture(model, args, kwargs), model, graph.ignored, for_class=graph.for_class)

    return Study(model, graph, data, again, seed, say or (lambda stage: None))


def _filled(study: Study, state: Mapping[str, Any]) -> int:
    """Zeros of sparse weights (a tenth of them or more) that a repair made other numbers."""
    found = 0
    for name, new in state.items():
        old = study.state[name]
        zero = (old == 0) if old.dim() > 1 and old.is_floating_point() else None
        if zero is not None and float(zero.float().mean()) >= 0.1:
            found += int((zero & (new != 0)).sum())
    return found
