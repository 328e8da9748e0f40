"""Walks the captured graph once, applies the rule of every op, and freezes what must keep its shape."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import fx, nn

from secateur.axes import BATCH, Axis, Dim, constant, freeze, unify
from secateur.errors import InputError
from secateur.trace.blocks import Block, find_blocks
from secateur.trace.call import Call, Dims, Value, module_of, op_name, shape_of, tensors_in
from secateur.trace.capture import Capture, capture
from secateur.trace.graph import Graph, Term, find_groups
from secateur.trace.rules import RULES
from secateur.trace.ties import tie

KNOWN_ELEMENTS = 1 << 20  # constants up to this many elements are evaluated to see whether they are permutations


def changes_or_draws(node: fx.Node) -> bool:
    """Whether an op writes into one of its arguments or draws random numbers: run once more it would not do the same."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and (schema.is_mutable or torch.Tag.nondeterministic_seeded in node.target.tags)


def written_in_place(graph: fx.Graph) -> set[fx.Node]:
    """Nodes whose memory some op may write into: arguments written to, and what they may be views of."""
    found: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None:
            continue
        for argument, value in zip(schema.arguments, node.args, strict=False):
            alias = argument.alias_info
            if isinstance(value, fx.Node) and alias is not None and (alias.is_write or node in found):
                found.add(value)
    return found


class Tracer:
    """What a rule may do besides unifying: freeze, count multiply-accumulates, look up constants."""

    def __init__(self, captured: Capture):
        self.capture = captured
        self.env: dict[fx.Node, Value] = {}
        self.terms: list[Term] = []
        self.notes: list[str] = []
        self._known: dict[fx.Node, Any] = {}
        self._written = written_in_place(captured.graph)

    def freeze(self, dims: Iterable[Dim], reason: str) -> None:
        for d in dims:
            freeze(d, reason)

    def macs(self, c: Call, dims: Dims, contracted: Dims = ()) -> None:
        """Count one op's multiply-accumulates: the product of `dims`; see `Term`."""
        self.terms.append(Term(c.module, c.op, tuple(dims), tuple(contracted), c.node))

    def opaque(self, c: Call, why: str) -> Value:
        """The honest answer for an op nobody described: everything it touches stays whole."""
        for dims in c.tensors():
            self.freeze(dims, c.reason(why))
        return c.constants(why)

    def known(self, node: Any) -> Any:
        """The value of a node that depends on constants alone, as a numpy array; None otherwise."""
        value = self._constant(node)
        return value.numpy() if isinstance(value, torch.Tensor) else None

    def _constant(self, node: Any) -> Any:
        if not isinstance(node, fx.Node):
            return node
        if node in self._known:
            return self._known[node]
        value = None
        if node in self._written:
            return None
        meta = node.meta.get("val")
        small = isinstance(meta, torch.Tensor) and not meta.is_floating_point() and meta.numel() <= KNOWN_ELEMENTS
        if node.op == "placeholder" and small:
            name = self.capture.tensors.get(node.name)
            found = self.capture.values.get(name) if name and name not in self.capture.trainable else None
            value = found.detach() if isinstance(found, torch.Tensor) and found.device.type == "cpu" else None
        elif node.op == "call_function" and small and not changes_or_draws(node):
            inputs = {n: self._constant(n) for n in node.all_input_nodes}
            if all(v is not None for v in inputs.values()):
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: inputs[n])
                value = node.target(*args, **kwargs)
        self._known[node] = value
        return value

    # ------------------------------------------------------------ the walk
    def run(self) -> None:
        for node in self.capture.graph.nodes:
            if node.op == "placeholder":
                self.env[node] = self._placeholder(node)
            elif node.op == "call_function":
                self.env[node] = self._call(node)
            elif node.op == "output":
                for n in node.all_input_nodes:
                    for dims in tensors_in(self.env.get(n)):
                        self.freeze(dims, "the model's output")

    def _placeholder(self, node: fx.Node) -> Value:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            return None
        if node.name in self.capture.tensors:
            return tuple(Axis(s) if s > 1 else constant(s, "an empty tensor") for s in shape_of(value))
        batch, *rest = [*shape_of(value), 0] if value.dim() else [0, 0]
        first = Axis(batch, "the model's input", BATCH) if batch > 1 else constant(batch, "the model's input")
        return (first, *(constant(s, "the model's input") for s in rest[:-1])) if value.dim() else ()

    def _call(self, node: fx.Node) -> Value:
        if op_name(node) == "getitem":
            source = self.env.get(node.args[0])
            return source[node.args[1]] if isinstance(source, list) else None
        c = Call(node, self.env)
        rule = RULES.get(c.op)
        if rule is None:
            if not any(True for _ in c.tensors()) or (node.meta.get("val") is None and not changes_or_draws(node)):
                return c.constants("an op without a rule")
            self.notes.append(f"{c.op} in {module_of(node)!r} has no rule: what it touches keeps its shape")
            return self.opaque(c, "an op without a rule")
        try:
            return self._checked(c, rule(self, c))
        except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, AssertionError, RecursionError) as error:
            self.notes.append(f"{c.op} in {module_of(node)!r}: its rule does not fit this use ({error})")
            return self.opaque(c, f"a use the rule does not know: {error}")

    def _checked(self, c: Call, value: Value) -> Value:
        """A rule that got a size wrong is a rule that does not know this use."""
        outputs = c.node.meta.get("val")
        pairs = [(value, outputs)] if isinstance(value, tuple) else zip(value or (), outputs or (), strict=False)
        for dims, tensor in pairs:
            if isinstance(dims, tuple) and isinstance(tensor, torch.Tensor) and [d.size for d in dims] != shape_of(tensor):
                raise ValueError(f"sizes {[d.size for d in dims]} where the op gives {shape_of(tensor)}")
        return value


def trace(
    model: nn.Module, args: tuple, kwargs: Mapping | None = None, *, ignore: Sequence[str] = (), for_class: bool = False
) -> Graph:
    """Find every axis of every tensor in `model`, and what must be cut together.

    Args:
        model: any module `torch.export` can capture; also on the meta device. It is not changed.
        args, kwargs: example inputs, as the model is called.
        ignore: names or shell patterns of modules, parameters or groups that keep their shape.
        for_class: tie what the model's own class cannot tell apart, see `secateur.trace.ties`.

    Raises:
        CaptureError: the model cannot be captured; the message names the line.
        InputError: a pattern of `ignore` matches nothing.
    """
    captured = capture(model, args, kwargs)
    return analyse(captured, model, patterns(ignore), for_class)


def patterns(ignore: Sequence[str] | str | None) -> tuple[str, ...]:
    """`ignore` as a tuple; one string is one pattern.

    Raises:
        InputError: something in it is no string.
    """
    found = (ignore,) if isinstance(ignore, str) else tuple(ignore or ())
    for p in found:
        if not isinstance(p, str):
            raise InputError(f"ignore holds {p!r}, a {type(p).__name__}.\n  Give names or patterns of modules, parameters or groups.")
    return found


def analyse(captured: Capture, model: nn.Module, ignore: Sequence[str] = (), for_class: bool = False) -> Graph:
    """The axes of a captured model (`trace` without the export)."""
    with _no_collection():
        return _analysed(captured, model, ignore, for_class)


@contextmanager
def _no_collection() -> Iterator[None]:
    """A garbage collection started by the many small objects here would walk everything the export left behind."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _analysed(captured: Capture, model: nn.Module, ignore: Sequence[str], for_class: bool) -> Graph:
    tracer = Tracer(captured)
    tracer.run()
    tensors: dict[str, Dims] = {}
    for node in captured.graph.nodes:
        if node.op == "placeholder" and node.name in captured.tensors:
            name = captured.tensors[node.name]
            name = captured.aliases.get(name, name)
            dims = tracer.env[node]
            for a, b in zip(tensors.setdefault(name, dims), dims, strict=True):
                unify(a, b)
    _freeze_shared_memory(captured, tensors)
    graph = Graph(captured, tracer.env, tracer.terms, tensors, _sizes(model), notes=tracer.notes, ignored=tuple(ignore), for_class=for_class)
    named = _axes_by_name(graph) if ignore else {}  # before anything is tied or frozen, which would rename what is left
    if for_class:
        tie(captured, tracer.env, model, tensors)
    for pattern in ignore:
        _ignore(graph, model, pattern, named)
    find_groups(graph)
    graph.blocks = {n: b for n, b in find_blocks(captured).items() if not _ignored(n, b, ignore)}
    return graph


def _ignored(name: str, block: Block, ignore: Sequence[str]) -> bool:
    """A block goes with all its tensors, so one ignored tensor keeps it; one that others use too stays, but no longer works in this place."""
    return any(fnmatchcase(n, p) for p in ignore for n in (name, *(x for t in (*block.tensors, *block.shared) for x in prefixes(t))))


def named_by(name: str, ignore: Sequence[str]) -> bool:
    """Whether a tensor, or a module that holds it, is named by one of the patterns."""
    return any(fnmatchcase(p, one) for one in ignore for p in prefixes(name))


def prefixes(name: str) -> list[str]:
    """'a.b.c' -> 'a', 'a.b', 'a.b.c'."""
    parts = name.split(".")
    return [".".join(parts[:i]) for i in range(1, len(parts) + 1)]


def _freeze_shared_memory(captured: Capture, tensors: Mapping[str, Dims]) -> None:
    """Parameters whose memory overlaps without being one tensor would part ways when cut. Next to one another in one
    buffer (`nn.LSTM` on a GPU) they do not."""
    places = []
    for name in tensors:
        value = captured.values.get(name)
        if value is not None and value.layout == torch.strided and value.numel():
            first = value.storage_offset()
            last = first + sum((size - 1) * step for size, step in zip(value.shape, value.stride(), strict=True))
            each = value.element_size()
            places.append((value.untyped_storage()._cdata, first * each, (last + 1) * each, name))
    furthest = (0, 0, 0, "")
    for place in sorted(places):
        storage, start, end, name = place
        if storage == furthest[0] and start < furthest[2]:
            other = furthest[3]
            for d in (*tensors[name], *tensors[other]):
                freeze(d, f"{name!r} and {other!r} share memory")
        if storage != furthest[0] or end > furthest[2]:
            furthest = place


def _sizes(model: nn.Module) -> dict[str, tuple[int, int, bool]]:
    out = {n: (p.numel(), p.element_size(), True) for n, p in model.named_parameters()}
    out.update({n: (b.numel(), b.element_size(), False) for n, b in model.named_buffers()})
    return out


def _axes_by_name(graph: Graph) -> dict[str, Axis]:
    trial = Graph(graph.capture, graph.env, graph.terms, graph.tensors, graph.sizes)
    find_groups(trial)
    return trial.axes


def _ignore(graph: Graph, model: nn.Module, pattern: str, named: Mapping[str, Axis]) -> None:
    """Freeze every dimension of the tensors named by `pattern`: a tensor, a module, or a group of this model."""
    found = False
    names = [*graph.tensors, *graph.capture.aliases]
    for name in names:
        if any(fnmatchcase(p, pattern) for p in prefixes(name)):
            found = True
            tensor = graph.capture.aliases.get(name, name)
            for d in graph.tensors.get(tensor, ()):
                freeze(d, f"ignored by {pattern!r}")
    if not found:
        for name, axis in named.items():
            if fnmatchcase(name, pattern):
                found = True
                freeze(axis, f"ignored by {pattern!r}")
    found = found or any(fnmatchcase(n, pattern) for n in find_blocks(graph.capture))
    if not found and not any(fnmatchcase(n, pattern) for n, _ in model.named_modules()):
        raise InputError(
            f"ignore={pattern!r} matches no module, parameter or group of {type(model).__name__}.\n"
            f"  Modules are named like {next((n for n, _ in model.named_modules() if n), '')!r}; `secateur inspect` lists the groups."
        )
