"""`advise.json` in the folder of an advice: written whole after every row, and read again to go on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from secateur import report
from secateur.advise.candidates import Source
from secateur.errors import FormatError, InputError
from secateur.figures import plain
from secateur.measure.run import shapes
from secateur.models import LoadedModel
from secateur.models.atomic import MARK, sha256
from secateur.models.data import tensors_of
from secateur.models.folder import read
from secateur.models.weights import fingerprint
from secateur.surgery.cut import state_of

FORMAT, FILE = "secateur-advice/1", "advise.json"
KEPT = "measured"  # what was refused may be installed by now


def key(loaded: LoadedModel, said: tuple[Source, Any], given: tuple[Any, Any, Any]) -> str:
    """Changes with all that decides a row: weights, rows, settings other than the minutes, the machine, versions."""
    from secateur import __version__

    source, settings = said
    inputs, train, test = given
    machine = {k: v for k, v in report.hardware().items() if k in ("cpu", "cores", "threads", "system")}
    chosen = {k: v for k, v in asdict(settings).items() if k not in ("minutes", "lose", "begun")}
    facts = [__version__, torch.__version__, loaded.name, asdict(source), chosen, machine, shapes(*inputs)]
    return fingerprint(facts, {**state_of(loaded.model), **tensors_of(train=train, test=test)})


def rows(folder: Path | None, wanted: str) -> dict[str, dict[str, Any]]:
    """The rows of an earlier run with this key, by name; of those with a folder, where it is whole."""
    if folder is None or not os.path.isfile(folder / FILE):
        return {}
    try:
        known = json.loads((folder / FILE).read_text(encoding="utf8"))
        if known.get("format") != FORMAT or known["settings"].get("key") != wanted:
            return {}
        return {row["name"]: row for row in known["rows"] if row["state"] == KEPT and _whole(folder, row)}
    except (ValueError, KeyError, TypeError, AttributeError, OSError):  # cut short, or of another make
        return {}


def _whole(folder: Path, row: Mapping[str, Any]) -> bool:
    if not row.get("plan_sha256"):
        return not row.get("folder") or (folder / row["folder"]).exists()
    try:
        read(folder / row["folder"])
        return sha256(folder / row["folder"] / MARK) == row["plan_sha256"]
    except (FormatError, InputError):
        return False


def write(folder: Path, advice: Mapping[str, Any]) -> None:
    """`advise.json`, `report.json` and `report.html`.

    Raises:
        FormatError: the disk is full or not writable.
    """
    facts = plain(advice)
    report.put(folder, {FILE: json.dumps(facts, indent=1, allow_nan=False) + "\n"})
    report.write(folder, report.facts(None, model=facts["name"], advice=facts, settings={"held-out rows": facts["held_out"]}))
