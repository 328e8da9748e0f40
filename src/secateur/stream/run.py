"""A language model made sparse block by block: a block's weights are read from the shards, made sparse with what the sparse
blocks before it give, and written as a shard of the result.

In memory are one block, the moments of what one of its layers takes in, and one sample. What flows between blocks lies on the disk,
so a run that was killed goes on from the last whole block and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur.errors import DataError, FormatError, InputError, ModelError, PlanError
from secateur.masks.network import LayerMask
from secateur.pattern import written
from secateur.stream.block import Rule, grams, in_order, linears, matrix, oriented, solve
from secateur.stream.calls import put_together, read, taken_apart
from secateur.stream.shards import INDEX, pieces, write, write_text
from secateur.stream.skeleton import Skeleton, block_calls, put
from secateur.trace.tracer import named_by, prefixes

MARK, PROGRESS, LOCK = "secateur.json", "progress.json", "lock"
FORMAT = "secateur-stream/1"
COPIED = 2**28  # numbers in a shard of tensors that are copied as they are

Feeds = Sequence[Mapping[str, Tensor]]


@dataclass
class Streamed:
    """What came of it: the folder, and every layer. `blocks` were done in this run, of `depth`; the others were there."""

    folder: Path
    masks: list[LayerMask] = field(default_factory=list)
    blocks: int = 0
    depth: int = 0
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        size, kept = sum(m.size for m in self.masks), sum(m.kept for m in self.masks)
        return {"folder": str(self.folder), "depth": self.depth, "blocks_done_now": self.blocks, "weights": size, "kept": kept,
                "notes": self.notes, "masks": [m.to_json() for m in self.masks]}  # fmt: skip


class Stream:
    """One run.

    Args:
        skeleton: the model and its shards.
        feeds: samples, each the keyword inputs of the whole model; one is in memory at a time.
        rule: what is asked of every layer.
        out: the folder of the result; the work lies in a folder beside it until it is done.
        at_once: all layers of a block from one pass over the samples, each with what the dense layers before it in the block give;
            otherwise layers that are given one tensor at a time, one pass for each.
        settings: what else the bytes of the result depend on; a run is taken up again only with the same.
    """

    def __init__(self, skeleton: Skeleton, feeds: Feeds, rule: Rule, out: Path, at_once: bool, settings: Mapping[str, Any]):
        self.skeleton, self.feeds, self.rule, self.out, self.at_once = skeleton, feeds, rule, out, at_once
        self.work = out.parent / f".{out.name}.part"
        self.scratch = self.work / "scratch"
        self.key = _digest({
            "rule": [rule.method.name, written(rule.pattern), str(rule.keep), rule.refit, list(rule.ignore)], "at_once": at_once,
            "shards": skeleton.shards.facts(), "feeds": _hash_of(feeds), **settings,
        })  # fmt: skip
        self.done: list[dict[str, Any]] = []
        self.lock: Any = None

    def run(self, say: Callable[[str], None]) -> Streamed:
        """
        Raises:
            InputError: the folder of an interrupted run belongs to other settings, or the result is there already.
            DataError: no sample, or one that gives numbers that are not finite.
            ModelError, FormatError: shards that are missing or damaged; a disk that is full. What was done is kept.
        """
        try:
            return self._run(say)
        finally:
            if self.lock is not None:  # a notebook keeps what an error was raised in
                self.lock.close()

    def _run(self, say: Callable[[str], None]) -> Streamed:
        result = Streamed(self.out, depth=self.skeleton.depth)
        self._begin()
        for index in range(len(self.done), self.skeleton.depth):
            say(f"block {index + 1} of {self.skeleton.depth}")
            self._block(index)
            result.blocks += 1
        say("copy what stays as it is")
        self._finish()
        result.masks = [LayerMask(**{**row, "shape": tuple(row["shape"])}) for block in self.done for row in block["masks"]]
        result.notes = _notes(self.done)
        return result

    # ------------------------------------------------------------ what is on the disk
    def _begin(self) -> None:
        if os.path.lexists(self.out):
            raise InputError(f"{self.out} is there already.\n  Choose another folder, or remove it.")
        if not self.feeds:
            raise DataError("there is no sample to calibrate with.\n  Give text or tokens.")
        self._check_layers()
        try:
            self.scratch.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FormatError(f"{self.work} could not be made: {error.strerror}.\n  Choose another place for the result.") from error
        self.lock = alone(self.work)
        if (self.work / PROGRESS).is_file():
            self._go_on()
            return
        for rest in [p for p in self.work.iterdir() if p.is_file() and p.name != LOCK]:
            rest.unlink()  # of a run that had not finished its first step
        for i, feed in enumerate(self.feeds):
            calls = block_calls(self.skeleton, feed)
            tensors, forms = taken_apart(calls)
            hidden = tensors.pop(forms[0]["hidden"])
            write(self._call(i), tensors or {"nothing": torch.zeros(1)})
            write_text(self._call(i).with_suffix(".json"), json.dumps(forms))
            write(self._hidden(0, i), {"x": hidden})
        self._progress()

    def _check_layers(self) -> None:
        """Every pattern of `ignore` means something, and there is a layer to be made sparse.

        Raises:
            InputError, PlanError: not so.
        """
        names, fitting = [], 0
        for i in range(self.skeleton.depth):
            path = f"{self.skeleton.blocks}.{i}"
            for n, module in linears(self.skeleton.block(i)).items():
                names += prefixes(f"{path}.{n}.weight")
                fitting += not (self._ignored(f"{path}.{n}") or self.rule.why_not(oriented(module, module.get_parameter("weight"))))
        for one in self.rule.ignore:
            if not any(fnmatchcase(n, one) for n in names):
                raise InputError(f"ignore={one!r} matches no linear layer in {self.skeleton.blocks}.\n  They are named like {names[-2]!r}.")
        if not fitting:
            raise PlanError(f"no linear layer in {self.skeleton.blocks} fits the pattern {self.rule.pattern}.\n  Choose another, or ignore fewer.")

    def _ignored(self, name: str) -> bool:
        return named_by(f"{name}.weight", self.rule.ignore)

    def _go_on(self) -> None:
        """Take up a run that was interrupted: everything it needs is there, and is what it wrote."""
        try:
            found = json.loads((self.work / PROGRESS).read_text())
            key, self.done = found["key"], list(found["done"])
            whole = all(_sha256(self.work / row["file"]) == row["sha256"] for row in self.done)
            needed = [f(i) for i in range(len(self.feeds)) for f in (self._call, partial(self._hidden, len(self.done)))]
            whole &= len(self.done) == self.skeleton.depth or all(path.is_file() for path in needed)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise FormatError(f"{self.work} cannot be gone on with: {type(error).__name__}: {error}.\n  Remove it and begin again.") from error
        if key != self.key:
            raise InputError(
                f"{self.work} holds an interrupted run with other settings, data or weights, so it cannot be gone on with.\n"
                "  Run it with what it was begun with, or remove that folder."
            )
        if not whole:
            raise FormatError(f"{self.work} was altered since it was interrupted: a shard or a hidden state differs.\n  Remove it and begin again.")

    def _call(self, sample: int) -> Path:
        return self.scratch / f"call-{sample}.safetensors"

    def _hidden(self, index: int, sample: int) -> Path:
        return self.scratch / f"hidden-{index}-{sample}.safetensors"

    def _progress(self) -> None:
        write_text(self.work / PROGRESS, json.dumps({"format": FORMAT, "key": self.key, "done": self.done}))

    # ------------------------------------------------------------ one block
    def _block(self, index: int) -> None:
        block, path = self.skeleton.block(index), f"{self.skeleton.blocks}.{index}"
        stored = self.skeleton.fill(block, path)
        forms = [json.loads(self._call(i).with_suffix(".json").read_text())[index] for i in range(len(self.feeds))]

        def call(sample: int) -> Any:
            args, kwargs = put_together(read(self._call(sample)), forms[sample], read(self._hidden(index, sample))["x"])
            try:
                with torch.no_grad():
                    return block(*args, **kwargs)
            except Exception as error:  # whatever the block raises
                raise ModelError(f"block {index} cannot be run by itself: {type(error).__name__}: {error}.\n  Leave --stream out.") from error

        masks, facts = self._solved(block, path, call, stored)
        for sample in range(len(self.feeds)):
            y = call(sample)
            y = y[0] if isinstance(y, (tuple, list)) else y
            if not bool(torch.isfinite(y).all()):
                raise DataError(f"block {index} gives numbers that are not finite on sample {sample}.\n  Look for NaN in its weights.")
            write(self._hidden(index + 1, sample), {"x": y})
        self.skeleton.empty(block)
        shard = self.work / f"block-{index:05d}.safetensors"
        write(shard, stored)
        self.done.append({"file": shard.name, "sha256": _sha256(shard), "masks": [m.to_json() for m in masks], "weights": facts})
        self._progress()
        for sample in range(len(self.feeds)):
            self._hidden(index, sample).unlink(missing_ok=True)

    def _solved(self, block: nn.Module, path: str, call: Callable, stored: dict[str, Tensor]) -> tuple[list[LayerMask], dict[str, Any]]:
        """The block's layers made sparse in place, in the module and among the stored tensors."""
        layers = {n: m for n, m in linears(block).items() if not self._ignored(f"{path}.{n}")}
        groups = in_order(block, layers, call)
        samples, rows, facts = range(len(self.feeds)), list[LayerMask](), dict[str, Any]()
        seen = grams(groups, layers, samples, call) if self.at_once else None
        for i, group in enumerate(groups):
            gram, tokens = seen[i] if seen is not None else grams([group], layers, samples, call)[0]
            for n in group:
                key = self.skeleton.stored(f"{path}.{n}.weight")
                module, name = layers[n], f"{path}.{n}"
                weight = oriented(module, stored[key])
                why = self.rule.why_not(weight)
                if not tokens and not any(isinstance(block.get_submodule(p), nn.ModuleList) for p in prefixes(n)[:-1]):
                    why = "it never runs as a layer, so nothing is known of what it takes in"
                if why:
                    rows.append(LayerMask(name, matrix(weight), weight.numel(), str(self.rule.pattern), tokens, dense=weight.numel(), why=why))
                    continue
                new, stays, row = solve(name, weight.float(), gram, tokens, self.rule)
                kept_form = torch.where(stays, new.to(weight.dtype), torch.zeros((), dtype=weight.dtype)) + 0.0
                stored[key] = (kept_form if weight is stored[key] else kept_form.t()).contiguous()
                put(module, "weight", stored[key].float())
                rows.append(row)
                turned = not isinstance(module, nn.Linear)
                facts[key] = {"pattern": written(self.rule.pattern, turned), "kept": row.kept, "zeros": int((kept_form == 0).sum())}
            if seen is not None:
                seen[i] = (None, 0)
        return rows, facts

    # ------------------------------------------------------------ the end
    def _finish(self) -> None:
        """The tensors outside the blocks, the index, the other files of the folder; then the work gets its name."""
        source, blocks = self.skeleton.shards, {n for i in range(self.skeleton.depth) for n in self.skeleton.names(i)}
        where = {n: self.done[i]["file"] for i in range(self.skeleton.depth) for n in self.skeleton.names(i)}
        hashes = {row["file"]: row["sha256"] for row in self.done}
        for lot, names in enumerate(pieces([n for n in source.names() if n not in blocks], source, COPIED)):
            file = self.work / f"rest-{lot:05d}.safetensors"
            write(file, source.read(names))
            hashes[file.name] = _sha256(file)
            where |= dict.fromkeys(names, file.name)
        size = sum((self.work / f).stat().st_size for f in hashes)
        write_text(self.work / INDEX, json.dumps({"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}, indent=1))
        ours = {INDEX, MARK, *source.files.values()}
        for other in sorted(source.folder.iterdir()):
            if other.is_file() and other.name not in ours and other.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
                shutil.copyfile(other, self.work / other.name)
                hashes[other.name] = _sha256(self.work / other.name)
            elif other.is_dir() and not other.name.startswith(".") and self.work.resolve() not in (other.resolve(), *other.resolve().parents):
                shutil.copytree(other, self.work / other.name, dirs_exist_ok=True)
        hashes[INDEX] = _sha256(self.work / INDEX)
        weights = {n: f for row in self.done for n, f in row["weights"].items()}
        mark = {"format": FORMAT, "method": self.rule.method.name, "files": hashes, "weights": weights}
        write_text(self.work / MARK, json.dumps({**mark, "sha256": _digest(mark)}, indent=1))
        try:
            os.rename(self.work, self.out)
        except OSError as error:
            raise FormatError(f"{self.work} is done and could not be renamed to {self.out}: {error.strerror}.\n"
                              "  Run the same command again once it can be, or rename it yourself.") from error  # fmt: skip
        shutil.rmtree(self.out / self.scratch.relative_to(self.work))  # only now: until then the same command can go on
        for rest in [*self.out.glob(".*.new"), self.out / PROGRESS, self.out / LOCK]:
            rest.unlink(missing_ok=True)


def alone(work: Path) -> Any:
    """A lock that goes with the process that holds it.

    Raises:
        InputError: another run holds it.
    """
    try:
        import fcntl
    except ImportError:  # not on Windows
        return None
    file = (work / LOCK).open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise InputError(f"another run is at work in {work}.\n  Wait for it, or choose another folder.") from error
    return file


def _notes(done: Sequence[Mapping[str, Any]]) -> list[str]:
    reasons: dict[str, list[str]] = {}
    for block in done:
        for row in block["masks"]:
            if row["why"]:
                reasons.setdefault(row["why"], []).append(row["layer"])
    return [f"{len(names)} layers ({', '.join(names[:3])}{' ...' if len(names) > 3 else ''}): {why}" for why, names in reasons.items()]


def _hash_of(feeds: Feeds) -> str:
    """Of all samples, so that a run is not gone on with other data."""
    total = hashlib.sha256()
    for feed in feeds:
        for name in sorted(feed):
            total.update(name.encode())
            total.update(tree_map_only(Tensor, lambda t: t.contiguous(), feed[name]).numpy().tobytes())
    return total.hexdigest()


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
