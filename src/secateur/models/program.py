"""Exported programs (.pt2), looked through before `torch.export.load` sees them.

That function unpickles whatever an archive asks it to, evaluates the archive's shape expressions, and looks operators
up as attributes of `torch`. So the archive is read first, as the zip of JSON and raw bytes it is, and anything that
would reach one of those three is refused.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import fx, nn

from secateur.errors import ModelError
from secateur.models.graph_file import opens_files

_RAW = re.compile(r"(weight|tensor)_\d+")
_KNOWN = re.compile(r"[^/]*|\.data/[^/]*|extra/.*|models/[^/]+\.json|data/sample_inputs/[^/]+\.pt|"
                    r"data/(weights|constants)/((weight|tensor)_\d+|[^/]+_config\.json)")  # fmt: skip
_OPERATOR = re.compile(r"torch\.ops\.\w+\.\w+(\.\w+)?|(_operator|math)\.[a-z_]+|torch\.sym_\w+")
_EXPRESSION = re.compile(r"[\w\s+\-*/%(),.<>=!&|~]*")
_WORDS = re.compile(r"[A-Za-z_]\w*")
_SYMBOLS = re.compile(r"[suzf]\d+|zuf\d+|Max|Min|Mod|FloorDiv|CleanDiv|PythonMod|CeilDiv|ModularIndexing|"
                      r"Eq|Ne|Lt|Le|Gt|Ge|And|Or|Not|True|False|int_oo|oo|ToFloat|TruncToInt|FloorToInt|CeilToInt|IntTrueDiv|"
                      r"FloatTrueDiv|PowByNatural|FloatPow|Identity|Where|Piecewise|"
                      r"Symbol|Integer|Float|Rational|Add|Mul|Pow|Equality|Unequality|StrictLessThan|LessThan|"
                      r"StrictGreaterThan|GreaterThan|positive|nonnegative|integer|real|precision")  # fmt: skip
_QUOTED = re.compile(r"'([suzf]\d+|zuf\d+|[\d.]+)'")  # a symbol's name or a number's digits, as sympy writes them
_SPEC_TYPES = {None, "builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict"}
_REFUSED = ("torch.ops.aten.from_file", "torch.ops.aten.save")


def load_program(path: Path) -> tuple[nn.Module, tuple | None, dict[str, Any]]:
    """(the program as a module, its example inputs or None, its keyword inputs).

    Raises ModelError: no such file, not an exported program of this format, or something in it that could run code.
    """
    if not path.is_file():
        raise ModelError(f"{path} does not exist (looked from {Path.cwd()}).\n  Check the path.")
    inputs = _look_through(path)
    try:
        module = torch.export.load(path).module(check_guards=False)
        module = fx.GraphModule(module, module.graph)  # one whose mode may be set; the exporter's refuses
    except Exception as error:  # the reader raises many unrelated types
        first = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(f"{path} cannot be loaded by torch {torch.__version__}: {first}.\n"
                         "  Export the model again with this version of torch.") from error  # fmt: skip
    args, kwargs = inputs if inputs is not None else (None, {})
    return module, args, kwargs


def _look_through(path: Path) -> tuple[tuple, dict[str, Any]] | None:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            members = {name.partition("/")[2]: archive.read(name) for name in names if not _is_raw(name)}
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise ModelError(f"{path} is no exported program: {error}.\n"
                         "  Write it with torch.export.save(program, path).") from error  # fmt: skip
    if len({name.partition("/")[0] for name in names}) != 1 or not any(n.startswith("models/") for n in members):
        raise ModelError(f"{path} is an archive of another kind or an older format.\n"
                         "  Write it again with torch.export.save(program, path).")  # fmt: skip
    if len({name.lower() for name in names}) != len(names):  # readers differ in which of two they take
        raise _refused(path, "two of its members have the same name")
    for name in (name.partition("/")[2] for name in names):
        if not _KNOWN.fullmatch(name):
            raise _refused(path, f"{name} is an object of some class, or nothing that torch.export writes")
    inputs = None
    for name, content in members.items():
        if name.startswith("data/sample_inputs/"):
            inputs = _sample_inputs(path, content)
        elif name.startswith(("models/", "data/")):
            _check_json(path, name, content)
    return inputs


def _is_raw(name: str) -> bool:
    return _RAW.fullmatch(name.rpartition("/")[2]) is not None


def _sample_inputs(path: Path, content: bytes) -> tuple[tuple, dict[str, Any]] | None:
    if not content:
        return None
    try:
        held = torch.load(io.BytesIO(content), weights_only=True)
    except (UnpicklingError, RuntimeError, EOFError) as error:
        raise _refused(path, "its sample inputs hold more than tensors") from error
    return held if isinstance(held, tuple) and len(held) == 2 else None


def _may_open_files(target: str) -> bool:
    """`torch.ops.image.write_file.default` and the like."""
    space, _, name = target.removeprefix("torch.ops.").partition(".")
    packet = getattr(getattr(torch.ops, space), name.partition(".")[0], None) if target.startswith("torch.ops.") else None
    if isinstance(packet, torch._ops.HigherOrderOperator):
        return False
    if packet is not None and not isinstance(packet, torch._ops.OpOverloadPacket):
        return True  # such as a method of `torch.ops` itself
    return packet is not None and any(opens_files(getattr(packet, overload)) for overload in packet.overloads())


def _check_json(path: Path, name: str, content: bytes) -> None:
    try:
        document = json.loads(content)
    except ValueError as error:
        raise ModelError(f"{path}: {name} is not JSON: {error}.\n  The file is damaged: export again.") from error
    for key, value in _pairs(document):
        if key == "use_pickle" and value is not False:
            raise _refused(path, f"{name} keeps a tensor of a class of its own, pickled")
        if key == "path_name" and not _RAW.fullmatch(str(value)):
            raise _refused(path, f"{name} keeps an object in {value}")
        if key == "target" and (not _OPERATOR.fullmatch(str(value)) or str(value).startswith(_REFUSED) or _may_open_files(value)):
            raise _refused(path, f"it calls {str(value)[:80]!r}, which is no tensor operator")
        if key == "expr_str":
            _check_expression(path, str(value))
        if key in ("in_spec", "out_spec") and value:
            _check_spec(path, str(value))


def _check_expression(path: Path, text: str) -> None:
    bare = _QUOTED.sub(r"\1", text)
    words = _WORDS.findall(bare)
    plain = _EXPRESSION.fullmatch(bare) and not re.search(r"\.\s*[A-Za-z_]", bare)
    if not plain or not all(_SYMBOLS.fullmatch(word) for word in words):
        raise _refused(path, f"a size is {text[:80]!r}, which is no arithmetic on sizes")


def _check_spec(path: Path, text: str) -> None:
    for key, value in _pairs(json.loads(text)):
        if key == "type" and value not in _SPEC_TYPES and not str(value).startswith("transformers."):
            raise _refused(path, f"it takes or returns a {value}, which is no plain container")
        if key == "context" and value and "__enum__" in str(value):
            raise _refused(path, "its inputs or outputs are keyed by an enum, which loading would import")


def _pairs(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, at any depth."""
    if isinstance(value, dict):
        for key, held in value.items():
            yield key, held
            yield from _pairs(held)
    elif isinstance(value, list):
        for held in value:
            yield from _pairs(held)


def _refused(path: Path, why: str) -> ModelError:
    return ModelError(
        f"{path} was refused, because loading it could run code: {why}.\n"
        "  Build the model from its own code instead (file.py:factory), or export it again with plain tensors and "
        "torch.export.save."
    )
