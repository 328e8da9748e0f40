"""Functions by name: `pkg.mod:function` from the import path, `file.py:function` from a file."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from secateur.errors import SecateurError


def import_function(spec: str, kind: type[SecateurError], option: str) -> Callable[..., Any]:
    """The function `spec` names. Raises `kind`, naming what was not found and where it was looked for."""
    place, _, name = spec.rpartition(":")
    module = _from_file(Path(place), spec, kind) if place.endswith(".py") else _from_path(place, spec, kind, option)
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        held = {n: value for n, value in vars(module).items() if not n.startswith("_") and callable(value)}
        own = [n for n, value in held.items() if getattr(value, "__module__", None) == module.__name__] or list(held)
        names = list(dict.fromkeys([*get_close_matches(name, own), *own]))
        raise kind(f"{place} has no function {name!r}; it has {', '.join(names[:8]) or 'none'}.\n"
                   f"  Write {place}:NAME with one of them.")  # fmt: skip
    return found


def _from_file(path: Path, spec: str, kind: type[SecateurError]) -> Any:
    if not path.is_file():
        raise kind(f"{spec}: {path} does not exist (looked from {Path.cwd()}).\n  Check the path.")
    name = path.stem
    description = importlib.util.spec_from_file_location(name, path)
    if description is None or description.loader is None:
        raise kind(f"{spec}: {path} is not a Python file.\n  Give a .py file.")
    if (beside := str(path.resolve().parent)) not in sys.path:
        sys.path.insert(0, beside)  # as `python file.py` does: what the file imports from its folder is found
    module = importlib.util.module_from_spec(description)
    sys.modules.setdefault(name, module)  # dataclasses and torch.export look a class's module up by name
    return _executed(lambda: description.loader.exec_module(module), module, spec, kind)  # type: ignore[union-attr]


def _from_path(place: str, spec: str, kind: type[SecateurError], option: str) -> Any:
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does: a user's module is found beside where the command is typed
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        raise kind(
            f"{spec}: there is no module {error.name!r}.\n"
            "  Check the spelling, run the command in the folder that holds it, or install it: "
            f"pip install {error.name}"
        ) from error
    except (ValueError, TypeError) as error:
        raise kind(f"{option} {spec!r} is not a module and a function.\n  Write pkg.mod:function.") from error
    except (Exception, SystemExit) as error:
        raise kind(f"{spec}: importing {place} failed: {type(error).__name__}: {error}.\n  Mend it first.") from error


def _executed(run: Callable[[], None], module: Any, spec: str, kind: type[SecateurError]) -> Any:
    try:
        run()
    except (Exception, SystemExit) as error:  # a script that parses arguments ends itself when it is imported
        raise kind(f"{spec}: running the file failed: {type(error).__name__}: {error}.\n  Mend it first.") from error
    return module
