"""How a block is called, as files: its tensors, and what JSON can say of the rest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from secateur.errors import DataError, ModelError


def taken_apart(calls: Sequence[tuple[tuple, dict[str, Any]]]) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """The tensors of all calls of one sample by name, in float32 where they are of floating point, each once; and for each call what
    JSON can say of the rest. The hidden state is the first positional argument, or `hidden_states`.

    Raises:
        DataError: there is none. ModelError: something cannot be kept, or happens between the blocks.
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
        if value is None or isinstance(value, (bool, int, float, str)):
            return {"value": value}
        raise ModelError(f"a block is called with a {type(value).__name__}, which cannot be kept on the disk.\n  Leave --stream out.")

    def named(name: str, value: Any) -> Any:
        of_past = "past" in name or "cache" in name  # belongs to generating text, not to the block
        return {"value": None} if of_past and not isinstance(value, (Tensor, bool)) else told(value)

    forms = []
    for args, kwargs in calls:
        form: dict[str, Any] = {"args": [told(v) for v in args], "kwargs": {k: named(k, v) for k, v in kwargs.items()}}
        first = form["args"][0] if args else form["kwargs"].get("hidden_states", {})
        if "tensor" not in first:
            raise DataError(f"a block is called with {list(kwargs)} and no tensor in front, so its input is not known.\n  Leave --stream out.")
        forms.append({**form, "hidden": first["tensor"]})
        if first["tensor"] != forms[0]["hidden"]:
            raise ModelError("the model changes what flows between its blocks, and streaming would leave that out.\n  Leave --stream out.")
    return tensors, forms


def put_together(tensors: Mapping[str, Tensor], form: Mapping[str, Any], hidden: Tensor) -> tuple[tuple, dict[str, Any]]:
    def made(told: Mapping[str, Any]) -> Any:
        if "tensor" in told:
            return hidden if told["tensor"] == form["hidden"] else tensors[told["tensor"]]
        return tuple(made(v) for v in told["tuple"]) if "tuple" in told else told["value"]

    return tuple(made(v) for v in form["args"]), {k: made(v) for k, v in form["kwargs"].items()}


def read(path: Path) -> dict[str, Tensor]:
    with safe_open(path, "pt") as held:
        return {n: held.get_tensor(n) for n in held.keys()}  # noqa: SIM118  # it is no dict
