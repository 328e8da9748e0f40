"""What a folder must hold for a cut model to come back: its tensors, its module attributes, its graph."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_map_only

from secateur.errors import FormatError
from secateur.measure.run import at_rest, untouched
from secateur.models import graph_file
from secateur.models.example import rebuild
from secateur.surgery.attributes import Edit
from secateur.surgery.fixed import hold_inputs, hold_sizes
from secateur.surgery.sizes import held_sizes, rows_of
from secateur.trace.capture import evaluating

if TYPE_CHECKING:
    from secateur.prune import Result

Dim = torch.export.Dim


@dataclass(frozen=True)
class Entry:
    """One tensor of a model and what it is there: "parameter", "buffer", or "constant" (of the graph alone)."""

    value: Tensor
    kind: str
    persistent: bool = True

    def to_json(self) -> dict[str, Any]:
        value = self.value
        out: dict[str, Any] = {
            "shape": list(value.shape),
            "dtype": str(value.dtype).removeprefix("torch."),
            "kind": self.kind,
        }
        if self.kind == "parameter" and not value.requires_grad:
            out["frozen"] = True
        if not self.persistent:
            out["persistent"] = False
        if not value.is_contiguous() and value._is_view() is False and _gapless(value.shape, value.stride()):
            out["stride"] = list(value.stride())
        return out


def _gapless(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether these are the strides of a contiguous tensor with its dimensions in another order: every element has one place of its own, and no
    place is left over. Those of an expanded tensor are not, nor those of a window."""
    after = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if step < 0 or (size != 1 and step != after):
            return False
        after *= size
    return True


# ---------------------------------------------------------------- tensors
def collect(model: nn.Module, module: fx.GraphModule | None) -> dict[str, Entry]:
    """Every parameter and buffer of `model` by name, tied ones under each of their names, and the constants that
    only its exported form `module` reads."""
    out = {name: Entry(p, "parameter") for name, p in model.named_parameters(remove_duplicate=False)}
    for path, owner in model.named_modules(remove_duplicate=False):
        for last, buffer in owner._buffers.items():
            if buffer is not None:
                name = f"{path}.{last}" if path else last
                out[name] = Entry(buffer, "buffer", last not in owner._non_persistent_buffers_set)
    if module is not None:
        for node in module.graph.nodes:
            if node.op == "get_attr" and node.target not in out:
                value = graph_file.fetch(module, str(node.target))
                if isinstance(value, Tensor):
                    out[str(node.target)] = Entry(value, "constant")
    return out


def share(tensors: Mapping[str, Entry]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors to store, other name -> stored name): tied tensors are stored once."""
    first: dict[tuple, str] = {}
    stored, aliases = {}, {}
    for name, entry in tensors.items():
        value = entry.value.detach()
        key = (value.untyped_storage().data_ptr(), value.storage_offset(), value.shape, value.stride(), value.dtype)
        if value.numel() and key in first:
            aliases[name] = first[key]
        else:
            first[key] = name
            # Cloned when it is a window onto a larger storage: safetensors would refuse the overlap.
            whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
            value = value.cpu().contiguous()
            stored[name] = value if whole else value.clone()
    return stored, aliases


def as_module_tensors(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every name of the folder with its tensor, parameters as `nn.Parameter`, tied names sharing one object."""
    out: dict[str, Tensor] = {}
    for name, facts in document["tensors"].items():
        if name not in document["aliases"]:
            out[name] = _restore(tensors[name], facts)
    for name, source in document["aliases"].items():
        out[name] = out[source]
    return out


def beside_state(document: Mapping[str, Any]) -> set[str]:
    """Names of the tensors that the state dict of the saved model does not have."""
    return {n for n, facts in document["tensors"].items() if facts["kind"] == "constant" or not facts.get("persistent", True)}


def _restore(tensor: Tensor, facts: Mapping[str, Any]) -> Tensor:
    """The tensor in memory of its own (not a window onto the file), laid out as it was when saved. Earlier versions wrote strides that no memory of
    its own can have, of expanded tensors; those are passed over."""
    stride: Any = facts.get("stride")
    laid_out = stride and _gapless(tensor.shape, stride)
    own = torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype) if laid_out else torch.empty_like(tensor)
    own.copy_(tensor)
    if facts["kind"] != "parameter":
        return own
    return nn.Parameter(own, requires_grad=not facts.get("frozen", False))


# ---------------------------------------------------------------- attributes and modes
def edits_to_json(edits: Sequence[Edit]) -> list[list[Any]]:
    """Module path, attribute, value before, value after; in JSON's types. Raises FormatError for exotic values."""
    try:
        return [[e.module, e.attribute, graph_file.encode(e.old), graph_file.encode(e.new)] for e in edits]
    except graph_file.CannotWrite as error:
        raise FormatError(f"An attribute the cut changed has no form in plan.json: {error}.\n"
                          "  Please report the model.") from error  # fmt: skip


def mode(model: nn.Module) -> dict[str, Any]:
    """Whether the model trains, and the modules that differ from it in that."""
    return {
        "training": model.training,
        "except": [name for name, m in model.named_modules() if m.training != model.training],
    }


# ---------------------------------------------------------------- with a factory
def rebuild_from_factory(
    factory: Callable[[], Any], document: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> nn.Module:
    """The factory's dense model with the folder's tensors and attributes in it.

    Raises FormatError if the factory builds a model with other tensors or attributes than the one that was cut.
    """
    if document["how"] == "graph":
        raise FormatError(
            "This model was cut by rewriting its graph, because its Python code has sizes written into forward(): "
            "a factory would bring those sizes back.\n  Load it without a factory."
        )
    try:
        built = factory()
    except (Exception, SystemExit) as error:
        raise FormatError(f"The factory failed: {type(error).__name__}: {error}.\n"
                          "  Pass a function that builds the dense model when it is called without arguments.") from error  # fmt: skip
    model = built[0] if isinstance(built, tuple) else built
    if not isinstance(model, nn.Module):
        raise FormatError(f"The factory returned a {type(model).__name__}, not an nn.Module.\n"
                          "  Give the function that builds the dense model.")  # fmt: skip
    restored = {n: t for n, t in as_module_tensors(document, tensors).items()
                if document["tensors"][n]["kind"] != "constant"}  # fmt: skip
    _same_names(model, restored)
    if type(model).__name__ != document["model"]:
        raise FormatError(f"The factory builds a {type(model).__name__}, the model saved is a {document['model']}.\n"
                          "  Pass the factory of the dense model that was pruned.")  # fmt: skip
    _set_attributes(model, document["edits"])
    for name, tensor in restored.items():
        path, _, last = name.rpartition(".")
        setattr(model.get_submodule(path), last, tensor)
    trains = document["mode"]["training"]
    different = set(document["mode"]["except"])
    for name, module in model.named_modules():
        module.training = trains != (name in different)
    return model


def same_function(model: nn.Module, known: fx.GraphModule, inputs: Mapping[str, Any]) -> None:
    """Run the rebuilt model beside the graph that was saved with it, on inputs like those it was pruned with.

    Raises FormatError if they differ by more than two machines may: then the factory builds other arithmetic.
    """
    try:
        args, kwargs = rebuild(inputs)
        expected = _outputs(known, args, kwargs)
    except Exception:  # inputs that plan.json cannot describe: there is nothing to compare with
        return
    try:
        found = _outputs(model, args, kwargs)
        said = "" if _alike(expected, found) else "its outputs differ from those of the graph saved with it"
    except Exception as error:  # a user's forward may raise anything
        said = f"it does not run: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
    if said:
        raise FormatError(f"The factory builds another model than the one saved ({type(model).__name__}): {said}.\n"
                          "  Pass the factory of the dense model that was pruned, with the same options.")  # fmt: skip


def _alike(expected: Sequence[Tensor], found: Sequence[Tensor]) -> bool:
    if [t.shape for t in expected] != [t.shape for t in found]:
        return False
    for a, b in zip(expected, found, strict=True):
        if a.is_floating_point():
            scale = float(a.nan_to_num(0.0, 0.0, 0.0).abs().max()) if a.numel() else 0.0
            if not torch.allclose(a.float(), b.float(), rtol=0.0, atol=1e-2 * scale, equal_nan=True):
                return False
    return True


def _same_names(model: nn.Module, restored: Mapping[str, Tensor]) -> None:
    found: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    found.update(model.named_buffers(remove_duplicate=False))
    differences = [f"it has no {name}" for name in restored if name not in found]
    differences += [f"it has {name}, the folder has not" for name in found if name not in restored]
    for name, tensor in restored.items():
        if name in found and found[name].dim() != tensor.dim():
            differences.append(f"its {name} is {list(found[name].shape)}, the folder's {list(tensor.shape)}")
        elif name in found and any(a < b for a, b in zip(found[name].shape, tensor.shape, strict=True)):
            differences.append(f"its {name} is {list(found[name].shape)}, smaller than {list(tensor.shape)}")
    if differences:
        raise FormatError(
            f"The factory builds another model than the one saved ({type(model).__name__}): "
            f"{'; '.join(differences[:3])}{' ...' if len(differences) > 3 else ''}.\n"
            "  Pass the factory of the dense model that was pruned, with the same options."
        )


def _set_attributes(model: nn.Module, edits: Sequence[Sequence[Any]]) -> None:
    for path, name, old, new in edits:
        owner = model.get_submodule(path)
        was, becomes = graph_file.decode(old, {}), graph_file.decode(new, {})
        found = getattr(owner, name, None)
        if found != was and found != becomes:
            raise FormatError(
                f"The factory builds another model than the one saved: {path}.{name} is {found!r}, it was {was!r} "
                "when the model was cut.\n  Pass the factory of the dense model that was pruned, with the same options."
            )
        setattr(owner, name, becomes)


# ---------------------------------------------------------------- the graph
def exported(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> tuple[fx.GraphModule | None, str]:
    """(the model as a graph that runs for any batch size where it can, else for this one, and refuses sizes it is wrong with; why there is none)."""
    if isinstance(model, fx.GraphModule):
        return model, ""
    program, why = captured(model, args, kwargs)
    if program is None:
        return None, why
    module = program.module(check_guards=False)  # those hold Python code, which is not written
    leaves, held = tree_leaves((args, dict(kwargs))), held_sizes(model, module, args, kwargs)
    hold_inputs(module.graph, leaves)
    hold_sizes(module.graph, held, leaves, rows_of(args, kwargs))
    module.recompile()
    return module, why


def captured(model: nn.Module, args: tuple, kwargs: Mapping[str, Any], lengths: bool = False) -> tuple[ExportedProgram | None, str]:
    """(the model as an exported program, for any batch size where it can be, else for this one; why there is none). With `lengths` inputs of
    tokens may have any length too, where that can be."""
    why = "torch.export could not follow it"
    for doubled, free in (*([(True, 2)] if lengths else []), (True, 1), (False, 1), (False, 0)):
        given = _doubled((args, dict(kwargs))) if doubled else (args, dict(kwargs))
        given = tree_map_only(Tensor, Tensor.detach, given)  # torch.export marks free dimensions on tensors, and leaves the marks when it fails
        shapes = _free(model, given, free) if free else None
        try:
            with evaluating(model):
                program = torch.export.export(model, given[0], given[1], dynamic_shapes=shapes, strict=False)
            if doubled:  # a batch of one was widened for the export; it must have come out free
                with at_rest(model):  # the program's tensors are the model's
                    _outputs(program.module(check_guards=False), args, kwargs)
            return program, ""
        except Exception as error:  # torch.export raises many unrelated types; the last one is kept as the reason
            why = f"torch.export could not follow it: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
    return None, why


def graph_of(result: Result, module: fx.GraphModule | None, tensors: Mapping[str, Entry], why: str) -> tuple[dict[str, Any] | None, str]:
    """(graph.json's contents, why there are none) for what `exported` gave. Outputs that come back as plain containers are told in the notes.

    Raises FormatError if there are none for a rewritten graph, which nothing else could load.
    """
    form, (args, kwargs) = None, result.graph.program.example_inputs or ((), {})
    if module is not None:
        form, why = graph_form(result.model, module, tensors, args, kwargs)
    if form is None and result.cut.how == "graph":
        raise FormatError(f"The model was not saved: its cut rewrote its graph, and that graph cannot be written: {why}.\n  Let forward() take and "
                          "return tensors in tuples, lists and dicts, or keep the model itself: torch.save(result.model, path).")  # fmt: skip
    if form is not None and module is not None and (own := graph_file.own_outputs(module)):
        said = f"a saved folder holds no classes: the graph in it returns tuples or dicts for {', '.join(own)}"
        result.notes += [said] if said not in result.notes else []
    return form, why


def graph_form(
    model: nn.Module, module: fx.GraphModule, tensors: Mapping[str, Entry], args: tuple, kwargs: Mapping[str, Any]
) -> tuple[dict[str, Any] | None, str]:
    """(graph.json's contents, why there are none). The graph is read back and run before it is believed."""
    try:
        form = graph_file.to_json(module)
        own = {name: entry.value for name, entry in tensors.items()}
        again = graph_file.from_json(form, own)  # their own: torch.matmul rounds otherwise where none wants gradients
        with untouched(tuple(own.values())):  # a forward may write into its tensors
            expected = _outputs(model, args, kwargs)
        with untouched(tuple(own.values())):
            found = _outputs(again, args, kwargs)
    except graph_file.CannotWrite as error:
        return None, f"the graph holds {error}"
    except (FormatError, RuntimeError, TypeError, ValueError) as error:
        return None, f"the graph did not come back: {str(error).splitlines()[0]}"
    if len(expected) != len(found) or not all(_identical(a, b) for a, b in zip(expected, found, strict=True)):
        return None, "the graph read back gives other outputs than the model"
    return form, ""


def _outputs(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that a forward gives; what it wrote into the model and its inputs is put back, so an output is a copy of what stood there."""
    with at_rest(model), untouched(args, kwargs):
        return [leaf.clone() for leaf in tree_leaves(model(*args, **kwargs)) if isinstance(leaf, Tensor)]


def _identical(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _doubled(inputs: Any) -> Any:
    """Batches of one made two: torch.export takes a dimension of size one for a constant."""
    return tree_map_only(Tensor, lambda t: torch.cat([t, t]) if t.dim() and t.shape[0] == 1 else t, inputs)


def _free(model: nn.Module, inputs: tuple[tuple, dict], dims: int) -> Any:
    """The first dimension of every input tensor left to torch.export to decide: free if the model allows it. With 2 `dims` also the second one
    of whole numbers, (rows, tokens)."""

    def of(t: Tensor) -> dict[int, Any] | None:
        tokens = dims == 2 and t.dim() == 2 and not t.is_floating_point()
        return {dim: Dim.AUTO for dim in range(2 if tokens else 1)} if t.dim() else None

    args, kwargs = tree_map_only(Tensor, of, inputs)
    args, kwargs = tree_map_only((bool, int, float, str), lambda _: None, (args, kwargs))
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs} if kwargs else args
