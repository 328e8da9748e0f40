"""`report.json` and `report.html` in a folder: written whole, or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from secateur.errors import FormatError
from secateur.figures import plain
from secateur.models.atomic import REPORT_FACTS, REPORT_PAGE, sync
from secateur.report.page import render


def write(folder: str | Path, facts: Mapping[str, Any]) -> Path:
    """Write `report.json` and `report.html` into `folder`, which is made where it is missing. Returns the page.

    Each is written under a temporary name beside the folder, forced to the disk and renamed. Raises FormatError where
    the facts have not their form, or the disk is full or not writable; each file is then the old one or the new one.
    """
    folder, facts = Path(folder), plain(facts)
    page = render(facts)
    text = json.dumps(facts, indent=1, allow_nan=False) + "\n"
    put(folder, {REPORT_FACTS: text, REPORT_PAGE: page})
    return folder / REPORT_PAGE


def read(path: str | Path) -> dict[str, Any]:
    """The facts of a `report.json`, or of the folder that holds one.

    Raises FormatError where there is none or it is no JSON object.
    """
    path = Path(path)
    path = path / REPORT_FACTS if path.is_dir() else path
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}.\n  `secateur prune -o FOLDER` writes one.") from error
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} cannot be read: {error}.\n  It was cut short: write it again.") from error
    if not isinstance(facts, dict):
        raise FormatError(f"{path} holds a {type(facts).__name__}, not an object.\n  Write it again.")
    return facts


def rewrite(path: str | Path) -> Path:
    """Write `report.html` again from the `report.json` beside it. Returns the page.

    Raises FormatError as `read` and `write` do.
    """
    path = Path(path)
    folder = path if path.is_dir() else path.parent
    put(folder, {REPORT_PAGE: render(read(path))})
    return folder / REPORT_PAGE


def put(folder: Path, texts: Mapping[str, str]) -> None:
    """Each text into its file of `folder`. The temporary names lie outside, so that an interrupted folder holds nothing foreign."""
    fresh = {name: folder.resolve().parent / f".{folder.resolve().name}.{name}-{os.getpid()}" for name in texts}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            fresh[name].write_text(text, encoding="utf-8")
            sync(fresh[name])
        for name, path in fresh.items():
            path.replace(folder / name)
    except OSError as error:
        raise FormatError(f"the report could not be written into {folder}: {error.strerror}.\n  Make room, or choose another folder.") from error
    finally:
        for path in fresh.values():
            with suppress(OSError):  # below a file, or under a name that is too long, nothing was written either
                path.unlink(missing_ok=True)
