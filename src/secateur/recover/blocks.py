"""Block by block a pruned model is trained to give what the dense one gives there, without labels.

    min over the weights of block k   |f_k(x_k) - y_k|^2 / |y_k|^2

x_k is what reaches block k in the pruned model, whose blocks before it are done; y_k is what the dense model gives there. Li et al. 2021, "BRECQ:
Pushing the Limit of Post-Training Quantization by Block Reconstruction"; for sparse weights Guo et al. 2024, "EBFT: Effective and Block-Wise
Fine-Tuning for Sparse LLMs". Held in memory are the inputs and the outputs of one block at a time; to get them, both models are run anew up to every
block, which for K blocks is the time of K / 2 passes over the rows.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.errors import DataError, InputError
from secateur.masks.hold import hold, zero
from secateur.measure import at_rest
from secateur.models.data import Batches
from secateur.models.quality import scores_of
from secateur.plan import Plan
from secateur.recover import checkpoint
from secateur.recover import loss as losses
from secateur.recover.order import rows_from, rows_of
from secateur.recover.place import gpus, moved
from secateur.recover.validate import alike, parted
from secateur.repair.chunks import ROWS

HELD_OUT = 5  # every fifth batch decides whether a block is kept, and is not trained on
FEWEST = 2 * HELD_OUT  # batches; fewer are cut into pieces
CACHES = ("past_key_values", "past_key_value")  # what attention of Hugging Face writes to when it is called
Call = tuple[tuple, dict[str, Any]]


@dataclass(frozen=True)
class Reconstruction:
    """How blocks are trained.

    Attributes:
        steps: of the optimizer for every block, each of one batch.
        lr: the highest rate of AdamW, which falls as a cosine to 0.
        rows: of the data, at most; a fifth of their batches is held out.
        seed: of the order of the batches.
    """

    steps: int = 200
    lr: float = 3e-3
    rows: int = ROWS
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("steps", 0), ("rows", 2)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name}={value!r}: a whole number from {least} on is asked.\n  The defaults are {Reconstruction.steps} and {ROWS}.")
        if not (0 < self.lr < math.inf):
            raise InputError(f"lr={self.lr}: a positive number is asked.\n  The default is {Reconstruction.lr:g}.")


@dataclass(frozen=True)
class Block:
    """What became of one block. Errors are those of held-out rows: the squared distance to the dense block's output, of its squares."""

    layer: str
    rows: int
    before: float
    after: float
    why: str = ""  # it was put back

    def to_json(self) -> dict[str, Any]:
        """A row of `repairs` of a report."""
        return {"layer": self.layer, "kind": "block", "rows": self.rows, "error_cut": self.before, "error_repaired": self.after, "held_out": True,
                "used": not self.why, "kept_plain": self.why or None}  # fmt: skip


@dataclass
class Reconstructed:
    """The model, trained in place; `before` and `after`: the same distance at the model's own output, on held-out rows."""

    model: nn.Module
    blocks: list[Block]
    before: float
    after: float
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"blocks": [b.to_json() for b in self.blocks], "before": self.before, "after": self.after, "notes": self.notes}


def reconstruct(
    model: nn.Module, teacher: nn.Module, data: Iterable[Any], how: Reconstruction | None = None, *, plan: Plan | None = None,
    folder: str | Path | None = None, progress: Callable[[int, int], None] | None = None,
) -> Reconstructed:  # fmt: skip
    """Train the blocks of `model` in place, one after the other. A block whose error on held-out rows did not fall is put back, and all are where the
    output of the whole model came no nearer to the dense one's.

    Args:
        model, teacher: the pruned and the dense model, of the same class: blocks are the members of module lists (`blocks.3`, `layer2.0`) whose
            outputs have the same shape in both. Both run at rest: norms keep their statistics, nothing drops out.
        data: batches as `recover` takes them; labels are not looked at.
        plan: its zeros stay zero.
        folder: for a checkpoint after every block; a run that finds one there goes on behind it.
        progress: called after every block with (block, blocks).

    In several processes every one does all of it, and comes to the same.

    Raises:
        InputError: no such blocks, as in a captured graph; a teacher of other outputs. DataError: fewer than two rows.
    """
    how = how or Reconstruction()
    run = _Run(model, teacher, how, plan)
    train, tests = _shares(data, how.rows, model)
    begun = checkpoint.digest(checkpoint.state_of(model))
    settings = {**asdict(how), "teacher": checkpoint.digest(checkpoint.state_of(teacher)),
                "zeros": checkpoint.digest(plan.weights) if plan else None, "data": _said(data, [*train, *tests])}  # fmt: skip
    with torch.random.fork_rng(devices=gpus(model)), at_rest(model), at_rest(teacher):
        if plan is not None and plan.weights:
            zero(model, plan)
        names = run.found(tests[0])
        first, start = run.whole(tests), checkpoint.state_of(model)
        held = checkpoint.read(Path(folder), settings, begun) if folder else None
        rows = [Block(**row) for row in json.loads(held["blocks"])] if held else []
        first = held["first"] if held else first
        if held:
            checkpoint.put(model, held["model"])
        for at in range(len(rows), len(names)):
            rows.append(run.block(names[at], train, tests, at))
            if folder and int(os.environ.get("RANK", "0")) == 0:
                checkpoint.write(Path(folder), {"settings": json.dumps(settings), "begun": begun, "first": first,
                                                "model": checkpoint.state_of(model), "blocks": json.dumps([asdict(b) for b in rows])})  # fmt: skip
            if progress:
                progress(at + 1, len(names))
        last = run.whole(tests)
        if not last < first and any(not b.why for b in rows):
            checkpoint.put(model, start)
            why = f"with all blocks trained the output was {last:.3g} from the dense one, {first:.3g} without"
            rows, last = [b if b.why else replace(b, why=why) for b in rows], first
    return Reconstructed(model, rows, first, last, run.notes)


def _part(plan: Plan, names: list[str]) -> Plan:
    return replace(plan, weights={n: plan.weights[n] for n in names}, patterns={n: plan.patterns[n] for n in names})


class _Reached(Exception):
    """A block has what was asked of it: the rest of the model need not run."""


class _Run:
    def __init__(self, model: nn.Module, teacher: nn.Module, how: Reconstruction, plan: Plan | None):
        self.model, self.teacher, self.how, self.plan = model, teacher, how, plan
        self.notes = list[str]()
        moved(teacher, next(model.parameters()).device)

    def found(self, call: Call) -> list[str]:
        """The blocks, outermost ones only, in the order in which they run.

        Raises:
            InputError: there are none.
        """
        names = losses.matched(self.model, self.teacher, lambda m: _called(m, call))
        names = [n for n in names if not any(n.startswith(f"{other}.") for other in names)]
        counts = Counter[str]()
        modules = dict(self.model.named_modules())
        handles = [modules[n].register_forward_pre_hook(lambda *_, n=n: counts.update([n])) for n in names]
        try:
            _called(self.model, call)
        finally:
            for handle in handles:
                handle.remove()
        often = [n for n in names if counts[n] != 1]
        if often:
            self.notes.append(f"{len(often)} blocks are called more than once and are left as they are: {', '.join(often[:3])}")
        names = [n for n in names if counts[n] == 1 and any(p.requires_grad for p in modules[n].parameters())]
        if not names:
            graph = any(isinstance(m, torch.fx.GraphModule) for m in self.model.modules())
            why = "it is a captured graph" if graph else "no member of a module list gives outputs of the same shape in both"
            raise InputError(f"{type(self.model).__name__} and {type(self.teacher).__name__} have no blocks in common: {why}.\n"
                             "  Load the pruned model as its own class (--factory), or train it as a whole.")  # fmt: skip
        return names

    def whole(self, calls: list[Call]) -> float:
        """The distance of the two outputs."""
        return _distance((scores_of(_called(self.model, call)), scores_of(_called(self.teacher, call))) for call in calls)

    def block(self, name: str, train: list[Call], tests: list[Call], number: int) -> Block:
        """Train one block and keep it, or put it back."""
        module = self.model.get_submodule(name)
        pairs, held = ([(_inputs(self.model, name, c), _output(self.teacher, name, c)) for c in calls] for calls in (train, tests))
        kept = [p.detach().clone() for p in module.parameters()]
        before = _error(module, held)
        with torch.enable_grad():
            self._train(name, module, pairs, number)
        after = _error(module, held)
        why = "" if after < before else f"training did not help on held-out rows: {after:.3g} against {before:.3g}"
        if why:
            for p, value in zip(module.parameters(), kept, strict=True):
                p.copy_(value)
        return Block(name, sum(rows_of(args or kwargs) for args, kwargs in train), before, before if why else after, why)

    def _train(self, name: str, module: nn.Module, pairs: list[tuple[Call, Tensor]], number: int) -> None:
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, self.how.lr, weight_decay=0.0)
        plan, ours = self.plan, {id(p) for p in trained}
        inside = [n for n in (plan.weights if plan else {}) if n.startswith(f"{name}.") and id(self.model.get_parameter(n)) in ours]
        held = hold(self.model, _part(plan, inside), optimizer) if plan and inside else None
        drawn = torch.Generator().manual_seed(self.how.seed + number)
        order = chain.from_iterable(torch.randperm(len(pairs), generator=drawn).tolist() for _ in range(-(-self.how.steps // len(pairs))))
        try:
            for step, at in zip(range(self.how.steps), order, strict=False):
                optimizer.param_groups[0]["lr"] = self.how.lr * 0.5 * (1 + math.cos(math.pi * step / self.how.steps))
                call, wanted = pairs[at]
                value = (_given(module, call) - wanted).float().square().sum() / wanted.float().square().sum().clamp_min(1e-12)
                value.backward()
                norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
                if not bool(torch.isfinite(norm)):
                    break  # what is worse on held-out rows is put back
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
        finally:
            optimizer.zero_grad(set_to_none=True)
            if held is not None:
                held.again()
                held.remove()


# ---------------------------------------------------------------- what goes into a block and what comes out
def _called(model: nn.Module, call: Call) -> Any:
    """What a whole model gives; the inputs are there for the next time too, though it may write into them."""
    args, kwargs = alike(call, model, copy=True)
    return model(*args, **kwargs)


def _inputs(model: nn.Module, name: str, call: Call) -> Call:
    """What a block is called with, its tensors detached."""
    seen = list[Call]()

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        seen.append((args, {k: None if k in CACHES else v for k, v in kwargs.items()}))
        raise _Reached

    handle = model.get_submodule(name).register_forward_pre_hook(hook, with_kwargs=True)
    _until(model, call, handle)
    return seen[0]


def _output(model: nn.Module, name: str, call: Call) -> Tensor:
    seen = list[Tensor]()

    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        seen.append(_first(output))
        raise _Reached

    handle = model.get_submodule(name).register_forward_hook(hook)
    _until(model, call, handle)
    return seen[0]


def _until(model: nn.Module, call: Call, handle: Any) -> None:
    try:
        _called(model, call)
    except _Reached:
        pass
    finally:
        handle.remove()


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, (tuple, list)) else output


def _given(module: nn.Module, call: Call) -> Tensor:
    """What a block gives; its inputs are there for the next time too, though it may write into them."""
    args, kwargs = tree_map_only(Tensor, torch.clone, call)
    return _first(module(*args, **kwargs))


def _error(module: nn.Module, pairs: list[tuple[Call, Tensor]]) -> float:
    return _distance((_given(module, call), wanted) for call, wanted in pairs)


def _distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Sum of squared differences over the sum of the second one's squares."""
    apart = size = 0.0
    for found, wanted in pairs:
        if found.shape != wanted.shape:
            raise InputError(f"The model gives {tuple(found.shape)} and the teacher {tuple(wanted.shape)}.\n"
                             "  Pass the teacher of this model: the one that it was cut from.")  # fmt: skip
        apart += float((found.double() - wanted.double()).square().sum())
        size += float(wanted.double().square().sum())
    return apart / max(size, 1e-300)


def _shares(data: Iterable[Any], rows: int, model: nn.Module) -> tuple[list[Call], list[Call]]:
    """Calls to train on, and calls that are held out.

    Raises:
        DataError: fewer than two rows.
    """
    pieces, count = list[Any](), 0
    for batch in data:
        have = min(rows_of(batch), rows - count)
        pieces.append(rows_from(batch, 0, have))
        count += have
        if count >= rows:
            break
    if count < 2:
        raise DataError(f"The data has {count} rows, and blocks are trained on some and judged on others.\n  Give at least two; 2,048 are read.")
    if len(pieces) < FEWEST:
        pieces = [piece for batch in pieces for piece in _cut(batch, -(-FEWEST // len(pieces)))]
    calls = [parted(piece, model)[:2] for piece in pieces]
    tests = calls[HELD_OUT - 1 :: HELD_OUT] or calls[-1:]
    return [c for c in calls if not any(c is t for t in tests)], tests


def _said(data: Iterable[Any], calls: list[Call]) -> str:
    """What a run that goes on has to have in common: the rows where they are at hand, else their form, as in `recover`."""
    leaves = [t for t in tree_leaves(calls) if isinstance(t, Tensor)]
    rows = checkpoint.digest({str(k): t for k, t in enumerate(leaves)}) if isinstance(data, Batches) else ""
    return f"{len(calls)} batches of {leaves[0].dtype} {tuple(leaves[0].shape[1:])} {rows}".strip()


def _cut(batch: Any, pieces: int) -> Iterator[Any]:
    have = rows_of(batch)
    pieces = min(pieces, have)
    for k in range(pieces):
        yield rows_from(batch, k * have // pieces, (k + 1) * have // pieces)
