"""One folder for a pruned model: `model.safetensors`, `plan.json` and, where it can be exported, `graph.json`.

The format is described in docs/format.md. Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch
from torch import Tensor, nn

from secateur.errors import FormatError, InputError, out_of_memory
from secateur.masks.exact import wrong_zeros
from secateur.models import graph_file, recipe
from secateur.models.atomic import GRAPH, MARK, TENSORS, backup, replace_folder, sha256
from secateur.models.example import describe, rebuild
from secateur.models.plan_file import with_bits, without_bits
from secateur.pack import read_archive, write_archive
from secateur.pack.archive import is_deflated
from secateur.plan import Plan

if TYPE_CHECKING:
    from secateur.prune import Result

PLAIN, PACKED = "secateur/1", "secateur/2"  # the second where tensors are packed; versions before it cannot read those


@dataclass(frozen=True)
class Saved:
    """A folder that was read and checked: its document and its tensors, each by name. `unlike`: one sentence for every weight that is not
    zero where its mask was; the plan in the document is without them."""

    folder: Path
    document: dict[str, Any]
    tensors: dict[str, Tensor]
    unlike: tuple[str, ...] = ()

    def example_inputs(self) -> tuple[tuple, dict[str, Any]]:
        """Random inputs of the shapes the model was pruned with: (args, kwargs), the same ones every time."""
        return rebuild(self.document["inputs"])


def save(result: Result, folder: str | Path, packed: bool = True, entropy: bool = False) -> Path:
    """Write what `prune` returned into `folder`, replacing an older result there only once the new one is complete.

    Args:
        result: of `prune`, `sparsify`, `mask` or `mend`. folder: a path.
        packed: store weights with zeros of the plan in the smallest layout (docs/format.md), where that is smaller than dense. `load` gives
            back the same bits either way.
        entropy: deflate the places of those weights as well; smaller from about 80 % zeros on, and slower to load.

    Returns the folder. The graph goes along when `torch.export` can follow the cut model and the graph read back
    gives the same outputs bit for bit; otherwise `plan.json` says why it does not, and `load` needs a factory. For outputs of a
    class of their own the graph returns a tuple (of a namedtuple) or a dict, and `result.notes` says so.

    Raises:
        InputError: not a result or not a path, the folder holds something else, or the model is on the meta device and
            has no values.
        FormatError: the disk is full or not writable, or the model is a rewritten graph that cannot be written. What was there before is
            unchanged.
    """
    folder = _path(folder)
    if not isinstance(getattr(result, "model", None), nn.Module) or not hasattr(result, "plan"):
        raise InputError(f"save() got a {type(result).__name__}.\n  Pass what prune() returned: save(result, folder).")
    args, kwargs = result.graph.program.example_inputs or ((), {})
    module, why = recipe.exported(result.model, args, kwargs)
    tensors = recipe.collect(result.model, module)
    meta = [name for name, entry in tensors.items() if entry.value.device.type == "meta"]
    if meta:
        raise InputError(
            f"{len(meta)} tensors are on the meta device ({meta[0]} ...): they have shapes and no values.\n"
            "  Prune the model with its weights loaded, or keep the plan alone: result.plan.to_json()."
        )
    stored, aliases = recipe.share(tensors)
    form, why = recipe.graph_of(result, module, tensors, why)
    document = {
        "versions": _versions(),
        "model": type(result.model).__name__,
        "how": result.cut.how,
        "graph": {"carried": form is not None, "why_not": why},
        "edits": recipe.edits_to_json(result.cut.edits),
        "mode": recipe.mode(result.model),
        "inputs": describe(args, kwargs),
        "tensors": {name: entry.to_json() for name, entry in tensors.items()},
        "aliases": aliases,
        "before": asdict(result.before),
        "after": asdict(result.after),
        "proof": result.proof.to_json(),
    }

    def fill(fresh: Path) -> None:
        names = {aliases.get(name, name) for name in result.plan.weights} if packed else set()
        held = _save_tensors(stored, fresh / TENSORS, names, entropy)
        if form is not None:
            (fresh / GRAPH).write_text(json.dumps(form, separators=(",", ":")))
        _finish(fresh, document, result.plan, (stored, aliases, held))

    replace_folder(folder, fill)
    return folder


def save_trained(saved: Saved, held: Mapping[str, Tensor], folder: str | Path, facts: Mapping[str, Any]) -> Path:
    """Write a folder anew with the tensors that the model loaded from it has now.

    Args:
        saved: what `read` gave. held: every parameter and buffer by name, whole, tied ones once.
        facts: JSON values for `plan.json` under "recovered".

    Raises:
        FormatError: other tensors than the folder's, weights that its plan removed and that are not zero, or the disk is full. What was there
            before is unchanged.
    """
    folder, document, aliases = _path(folder), saved.document, saved.document["aliases"]
    stored: dict[str, Tensor] = {}
    for name, entry in document["tensors"].items():
        if name in aliases:
            continue
        stored[name] = held[name].detach().cpu().contiguous() if name in held else saved.tensors[name]
        form = list(stored[name].shape), str(stored[name].dtype).removeprefix("torch.")
        if form != (entry["shape"], entry["dtype"]) or (name not in held and entry["kind"] != "constant"):
            raise FormatError(f"{name!r} is not in the model as it was in {saved.folder}.\n  Pass the model that was loaded from there.")
    plan = Plan.from_json(document["plan"])
    if wrong := wrong_zeros({n: stored[aliases.get(n, n)] for n in plan.weights}, plan.weights):
        raise FormatError(f"{wrong[0]}.\n  Train it with its zeros held: recover(..., plan=plan), or sc.hold.")

    def fill(fresh: Path) -> None:
        packed = document["format"] == PACKED
        chosen = {aliases.get(n, n) for n in plan.weights} if packed else set()
        names = _save_tensors(stored, fresh / TENSORS, chosen, is_deflated(saved.folder / TENSORS))  # as it was saved before
        if document["graph"]["carried"]:
            shutil.copyfile(saved.folder / GRAPH, fresh / GRAPH)
        _finish(fresh, {**document, "recovered": dict(facts)}, plan, (stored, aliases, names))

    replace_folder(folder, fill)
    return folder


def _finish(fresh: Path, document: Mapping[str, Any], plan: Plan, tensors: tuple[Mapping[str, Tensor], Mapping[str, str], Collection[str]]) -> None:
    """`plan.json`, last: with the hashes of all other files. `tensors`: those stored, other names of them, which are packed."""
    stored, aliases, held = tensors
    files = {p.name: {"bytes": p.stat().st_size, "sha256": sha256(p)} for p in sorted(fresh.iterdir())}
    state = {**stored, **{name: stored[source] for name, source in aliases.items()}}
    bits = without_bits(plan, state, {name for name in state if aliases.get(name, name) in held})
    (fresh / MARK).write_text(_sealed({**document, "format": PACKED if held else PLAIN, "plan": bits, "files": files}))
    shutil.copymode(fresh / MARK, fresh / TENSORS)  # safetensors writes for the owner alone


def load(folder: str | Path, factory: Callable[[], Any] | None = None) -> nn.Module:
    """The pruned model, ready to run, train or export.

    With `factory` (a function that builds the dense model, as before the cut) it is that class again, with smaller
    tensors. Without, it is the exported graph, when the folder carries one.

    Raises:
        FormatError: the folder is missing, incomplete, damaged or altered, or the factory builds something else (other
            tensors, other attributes or, where the folder carries the graph, other outputs); the message names the
            first differences. Nothing on disk is changed.
    """
    saved = read(folder)
    with _well_formed(saved.folder):
        return _rebuilt(saved, factory)


def _rebuilt(saved: Saved, factory: Callable[[], Any] | None) -> nn.Module:
    if factory is not None:
        model = recipe.rebuild_from_factory(factory, saved.document, saved.tensors)
        if saved.document["graph"]["carried"]:
            form = _json(saved.folder / GRAPH)
            known = graph_file.from_json(form, recipe.as_module_tensors(saved.document, saved.tensors))
            recipe.same_function(model, known, saved.document["inputs"])
        return model
    if not saved.document["graph"]["carried"]:
        raise FormatError(
            f"{saved.folder} carries no graph: {saved.document['graph']['why_not']}.\n"
            f"  Its model is a {saved.document['model']}; load it with the function that builds the dense one: "
            "load(folder, factory)."
        )
    form = _json(saved.folder / GRAPH)
    return graph_file.from_json(form, recipe.as_module_tensors(saved.document, saved.tensors), recipe.beside_state(saved.document))


def read(folder: str | Path) -> Saved:
    """Read a folder and check it: every file's size and hash, every tensor's name, shape and dtype.

    Raises FormatError saying what differs.
    """
    folder = _path(folder)
    if not _is_file(folder / MARK):
        old = backup(folder)
        hint = f"An interrupted save left the previous version in {old}; rename it." if _is_file(old / MARK) else (
            "Give the folder that save() or `secateur prune -o` wrote."
        )  # fmt: skip
        what = "has no plan.json" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
        raise FormatError(f"{folder} {what}.\n  {hint}")
    document = _unsealed(folder / MARK)
    if document.get("format") not in (PLAIN, PACKED):
        raise FormatError(
            f"{folder} has format {document.get('format')!r}, this version of secateur reads {PLAIN!r} and {PACKED!r}.\n"
            f"  It was written by secateur {document.get('versions', {}).get('secateur', '?')}: install that version."
        )
    with _well_formed(folder):
        for name in {TENSORS, *([GRAPH] if document["graph"]["carried"] else [])} - set(document["files"]):
            raise FormatError(f"{folder / MARK} has no hash of {name}.\n  It was changed: save the model again.")
        for name, facts in document["files"].items():
            if Path(name).name != name:
                raise FormatError(f"{folder / MARK} lists {name!r}, which is not in the folder itself.\n  It was changed: save the model again.")
            _check_file(folder / name, facts)
        tensors = read_archive(folder / TENSORS)
        _check_tensors(folder, document, tensors)
        state = {**tensors, **{name: tensors[source] for name, source in document["aliases"].items()}}
        document["plan"], unlike = with_bits(document["plan"], state)
    return Saved(folder, document, tensors, tuple(unlike))


# ---------------------------------------------------------------- the parts of a folder
def _path(folder: str | Path) -> Path:
    if not isinstance(folder, (str, os.PathLike)) or isinstance(folder, bytes) or "\0" in str(folder):
        raise InputError(f"{folder!r:.60} is no path of a folder.\n  Pass a string or a Path.")
    return Path(folder)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name longer than a name can be
        return False


@contextmanager
def _well_formed(folder: Path) -> Iterator[None]:
    """plan.json with the right hash may still lack what this version needs, or hold it in another form."""
    try:
        yield
    except (KeyError, TypeError, AttributeError, ValueError, IndexError, OverflowError, RuntimeError) as error:
        if out_of_memory(error):
            raise
        raise FormatError(
            f"{folder / MARK} has not the form that secateur writes: {type(error).__name__}: {error}.\n"
            "  It was changed, or written by another version: save the model again."
        ) from error


def _save_tensors(stored: Mapping[str, Tensor], path: Path, pack: Collection[str], entropy: bool) -> list[str]:
    """Returns which are packed, of those named in `pack`."""
    try:
        return write_archive(stored, path, pack, entropy)
    except safetensors.SafetensorError as error:  # its I/O errors carry no errno; ask the disk itself
        with path.open("ab") as file:
            file.write(b"\0" * 2**20)
            file.flush()
        raise FormatError(f"{path.name} could not be written: {error}") from error


def _sealed(document: dict[str, Any]) -> str:
    """The document with a hash over itself, so that a change in it is noticed too."""
    return json.dumps({**document, "sha256": _digest(document)}, indent=1, allow_nan=False) + "\n"


def _unsealed(path: Path) -> dict[str, Any]:
    document = _json(path)
    claimed = document.pop("sha256", None)
    if claimed != (found := _digest(document)):
        raise FormatError(
            f"{path} was altered after it was written: its contents hash to {found[:12]}..., it says "
            f"{str(claimed)[:12]}....\n  Restore the file, or save the model again."
        )
    return document


def _digest(document: Mapping[str, Any]) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text())
    except (ValueError, OSError, RecursionError) as error:  # ValueError covers bad JSON and bad UTF-8
        raise FormatError(f"{path} cannot be read: {error}.\n  It was cut short: save the model again.") from error
    if not isinstance(value, dict):
        raise FormatError(f"{path} holds a {type(value).__name__}, not an object.\n  Save the model again.")
    return value


def _check_file(path: Path, facts: Mapping[str, Any]) -> None:
    if not path.is_file():
        raise FormatError(f"{path} is missing; plan.json lists it with {facts['bytes']} bytes.\n  Copy it back, or "
                          "save the model again.")  # fmt: skip
    size = path.stat().st_size
    if size != facts["bytes"]:
        raise FormatError(
            f"{path} has {size} bytes, plan.json says {facts['bytes']}: it was cut short or replaced.\n"
            "  Copy the folder again, or save the model again."
        )
    if (found := sha256(path)) != facts["sha256"]:
        raise FormatError(
            f"{path} was altered: its sha256 is {found[:12]}..., plan.json says {facts['sha256'][:12]}....\n"
            "  Copy the folder again, or save the model again."
        )


def _check_tensors(folder: Path, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    expected = {name: facts for name, facts in document["tensors"].items() if name not in document["aliases"]}
    differences = [f"{name} is missing" for name in expected if name not in tensors]
    differences += [f"{name} is not in plan.json" for name in tensors if name not in expected]
    for name, tensor in tensors.items():
        if name in expected:
            said = (expected[name]["shape"], expected[name]["dtype"])
            found = (list(tensor.shape), str(tensor.dtype).removeprefix("torch."))
            if said != found:
                differences.append(f"{name} is {found[1]} {found[0]}, plan.json says {said[1]} {said[0]}")
    if differences:
        raise FormatError(
            f"{folder}: {TENSORS} and plan.json disagree in {len(differences)} tensors: {'; '.join(differences[:3])}.\n"
            "  The files are of two different models: save the model again."
        )


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        own = version("secateur")
    except PackageNotFoundError:  # run from a checkout that is not installed
        own = "unknown"
    return {"secateur": own, "torch": torch.__version__, "python": platform.python_version()}
