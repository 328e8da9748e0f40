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
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from secateur.errors import DataError, FormatError, InputError
from secateur.masks.network import LayerMask
from secateur.pattern import written
from secateur.stream.block import Rule, grams, in_order, linears, matrix, oriented, solve
from secateur.stream.shards import INDEX, pieces, write, write_text
from secateur.stream.skeleton import Skeleton, block_calls, put
from secateur.trace.tracer import prefixes

MARK, PROGRESS = "secateur.json", "progress.json"
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
        self.key = _digest({
            "rule": [rule.method.name, written(rule.pattern), str(rule.keep), rule.refit, list(rule.ignore)], "at_once": at_once,
            "shards": skeleton.shards.facts(), "feeds": _hash_of(feeds), **settings,
        })  # fmt: skip
        self.done: list[dict[str, Any]] = []

    def run(self, say: Callable[[str], None]) -> Streamed:
        """
        Raises:
            InputError: the folder of an interrupted run belongs to other settings, or the result is there already.
            DataError: no sample, or one that gives numbers that are not finite.
            ModelError, FormatError: shards that are missing or damaged; a disk that is full. What was done is kept.
        """
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
        if self.out.exists():
            raise InputError(f"{self.out} is there already.\n  Choose another folder, or remove it.")
        if not self.feeds:
            raise DataError("there is no sample to calibrate with.\n  Give text or tokens.")
        try:
            self.work.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise FormatError(f"{self.work} could not be made: {error.strerror}.\n  Choose another place for the result.") from error
        if (self.work / PROGRESS).is_file():
            found = json.loads((self.work / PROGRESS).read_text())
            if found["key"] != self.key:
                raise InputError(
                    f"{self.work} holds an interrupted run with other settings, data or weights, so it cannot be gone on with.\n"
                    "  Run it with what it was begun with, or remove that folder."
                )
            self.done = found["done"]
            return
        for i, feed in enumerate(self.feeds):
            calls = block_calls(self.skeleton, feed)
            tensors, forms = _taken_apart(calls)
            hidden = tensors.pop(forms[0]["hidden"])
            write(self._call(i), tensors or {"nothing": torch.zeros(1)})
            write_text(self.work / f"call-{i}.json", json.dumps(forms))
            write(self._hidden(0, i), {"x": hidden})
        self._progress()

    def _call(self, sample: int) -> Path:
        return self.work / f"call-{sample}.safetensors"

    def _hidden(self, index: int, sample: int) -> Path:
        return self.work / f"hidden-{index}-{sample}.safetensors"

    def _progress(self) -> None:
        write_text(self.work / PROGRESS, json.dumps({"format": FORMAT, "key": self.key, "done": self.done}))

    # ------------------------------------------------------------ one block
    def _block(self, index: int) -> None:
        block, path = self.skeleton.block(index), f"{self.skeleton.blocks}.{index}"
        stored = self.skeleton.fill(block, path)
        forms = [json.loads((self.work / f"call-{i}.json").read_text())[index] for i in range(len(self.feeds))]

        def call(sample: int) -> Any:
            form = forms[sample]
            with torch.no_grad():
                args, kwargs = _put_together(_read(self._call(sample)), form, _read(self._hidden(index, sample))["x"])
                return block(*args, **kwargs)

        masks, facts = self._solved(block, path, call, stored)
        for sample in range(len(self.feeds)):
            y = call(sample)
            y = y[0] if isinstance(y, (tuple, list)) else y
            if not bool(torch.isfinite(y).all()):
                raise DataError(f"block {index} gives numbers that are not finite on sample {sample}.\n  Look for NaN or infinity in its weights.")
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
        layers = {n: m for n, m in linears(block).items() if not any(part in f"{path}.{n}" for part in self.rule.ignore)}
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
        ours = {INDEX, PROGRESS, MARK, *source.files.values()}
        for other in sorted(source.folder.iterdir()):
            if other.is_file() and other.name not in ours and other.suffix not in (".safetensors", ".bin", ".pt", ".pth"):
                shutil.copyfile(other, self.work / other.name)
        weights = {n: f for row in self.done for n, f in row["weights"].items()}
        mark = {"format": FORMAT, "method": self.rule.method.name, "files": hashes, "weights": weights}
        write_text(self.work / MARK, json.dumps({**mark, "sha256": _digest(mark)}, indent=1))
        for rest in [*self.work.glob("hidden-*"), *self.work.glob("call-*"), *self.work.glob(".*.new"), self.work / PROGRESS]:
            rest.unlink()
        os.replace(self.work, self.out)


def _taken_apart(calls: Sequence[tuple[tuple, dict[str, Any]]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors of all calls of one sample by name, in float32 where they are of floating point, each once; and for each call what
    JSON can say of the rest. The hidden state is the first positional argument, or `hidden_states`.

    Raises:
        DataError: an argument is neither.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def told(value: Any) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in names:
                names[id(value)] = f"t{len(names)}"
                tensors[names[id(value)]] = (value.float() if value.is_floating_point() else value).clone()
            return {"tensor": names[id(value)]}
        if isinstance(value, (tuple, list)):
            return {"tuple": [told(v) for v in value]}
        known = value is None or isinstance(value, (bool, int, float, str))
        return {"value": value if known else None}  # a cache of past keys belongs to generating text, not to the block

    forms = []
    for args, kwargs in calls:
        form: dict[str, Any] = {"args": [told(v) for v in args], "kwargs": {k: told(v) for k, v in kwargs.items()}}
        first = form["args"][0] if args else form["kwargs"].get("hidden_states", {})
        if "tensor" not in first:
            raise DataError(f"a block is called with {list(kwargs)} and no tensor in front, so its input is not known.\n  Leave --stream out.")
        forms.append({**form, "hidden": first["tensor"]})
    return tensors, forms


def _put_together(tensors: Mapping[str, Tensor], form: Mapping[str, Any], hidden: Tensor) -> tuple[tuple, dict[str, Any]]:
    def made(told: Mapping[str, Any]) -> Any:
        if "tensor" in told:
            return hidden if told["tensor"] == form["hidden"] else tensors[told["tensor"]]
        return tuple(made(v) for v in told["tuple"]) if "tuple" in told else told["value"]

    return tuple(made(v) for v in form["args"]), {k: made(v) for k, v in form["kwargs"].items()}


def _read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as held:
        return {n: held.get_tensor(n) for n in held.keys()}  # noqa: SIM118  # it is no dict


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
