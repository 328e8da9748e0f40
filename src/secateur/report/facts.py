"""The schema of `report.json`, and building one from a job or a result.

A report is one JSON object. Every section may be missing; what is missing is not shown. `null` in the place of a number
means: not measured. Shares, accuracies and errors are fractions (0.5, not 50), times are seconds, sizes are bytes.

| section | what it holds |
| --- | --- |
| `format` | `"secateur-report/1"` |
| `model`, `created`, `versions` | name; when, ISO 8601; package → version |
| `how` | `"attributes"` (the model's own class) or `"graph"` (the captured graph, rewritten) |
| `settings` | `targets`, `score`, `allocation`, `repair`, `seed`, ... and `command`: the line that makes it again |
| `hardware` | `cpu`, `cores`, `threads`, `memory`, `gpu`, `system`, `python`, `torch` |
| `batch` | rows of the call that MACs are counted for |
| `cost` | rows of `figure` (macs, params, bytes, peak_bytes, nonzero), `dense`, `pruned`, `share` = pruned / dense |
| `targets` | rows of `asked` (text), `figure`, `limit`, `achieved`, `used` = achieved / limit, `met` (true, false or "within 5 %") |
| `accuracy` | `metric`, `rows` tested, `stages`: rows of `stage` (dense, cut, batch_norm, repaired), `value`, `points` beside dense |
| `latency` | rows of `runtime`, `threads`, `batch`, `dtype`, `dense`, `pruned`, `ratio` = pruned / dense, `speedup` = 1 / ratio |
| | where `dense` and `pruned` hold `samples`, `rounds`, `median`, and the quartiles `low` and `high`; a ratio that is given |
| | (of paired rounds) stays, else it is that of the medians |
| `energy` | of one call: `kind` (measured, estimate), `source`, `leaves_out`, `dense` and `pruned` (`joules`, ...), `share` = pruned / dense |
| `groups` | rows of `name`, `kind`, `before`, `after`, `share`; where known `macs_saved`, `params_saved` |
| `cut_groups` | how many `groups` there are (`all`) and how many of them lost units (`cut`) |
| `frozen` | rows of `reason`, `axes` (how many), `sizes`, `where` (examples) |
| `repairs` | rows of `layer`, `kind`, `rows`, `error_cut`, `error_repaired`, `held_out`, `used`, `kept_plain` (why, or null) |
| `training` | `epochs`, `steps` of the optimizer in all, `done` (0..1), `left` (seconds), and `rows` of `epoch`, `step`, `lr`, `loss`, `seconds` |
| | (so far), where measured `valid_loss` and `valid` (accuracy) |
| `sensitivity` | rows of `group`, `kind`, `points`: rows of `kept` (share of units), `macs`, `error`, and at a few `divergence` |
| `pareto` | rows of `label`, `macs`, `params`, `seconds`, `accuracy`, `kl`, `share` of the dense MACs, `chosen` |
| `advice` | what `secateur advise` found (docs/how-to/advise.md): `metric`, `held_out`, `dense`, `rows`, `verdict` |
| `proof` | `max_error`, `tolerance`, `passed`, `all_zero` |
| `notes` | sentences |
"""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from secateur.errors import InputError
from secateur.figures import plain
from secateur.report.hardware import hardware

FORMAT = "secateur-report/1"
SECTIONS = (
    "format model created versions how settings hardware batch cost targets accuracy latency energy groups cut_groups frozen repairs training "
    "sensitivity pareto advice proof notes"
).split()
MEASURED_WITHIN = 1.05  # how far above its budget a target that was measured still counts as reached
EXAMPLES = 5  # places named for one reason to freeze; a large network has thousands


def facts(done: Any = None, **sections: Any) -> dict[str, Any]:
    """The document of a report: what a job or a result knows, and the `sections` given.

    Args:
        done: a `Job`, a `Result`, the mapping of `Job.to_json()`, or None. From a job or result all groups and frozen
            axes are taken, from a mapping what it lists.
        sections: sections of the schema above; each replaces what `done` says, `settings` is merged. Derived figures
            may be left out: `latency` rows need lists of seconds, `accuracy` may be {stage: value}, `pareto` rows
            need no share.

    Returns plain JSON values: no NaN and no infinity (null stands there), no tuples, no tensors.
    Raises InputError for a section that does not exist or `done` of another kind.
    """
    unknown = sorted(set(sections) - set(SECTIONS))
    if unknown:
        raise InputError(f"a report has no section {unknown[0]!r}.\n  Its sections: {', '.join(SECTIONS)}.")
    known = _of(done)
    settings = {**(known.pop("settings", None) or {}), **(sections.pop("settings", None) or {})}
    sheet: dict[str, Any] = {
        "format": FORMAT, "created": datetime.now(UTC).isoformat(timespec="seconds"), "hardware": hardware(),
        **known, "settings": settings, **sections,
    }  # fmt: skip
    for name, complete in _COMPLETE.items():
        if sheet.get(name):
            sheet[name] = complete(sheet[name], sheet)
    if sheet.get("groups") is not None and "cut_groups" not in sections:
        lost = [row for row in sheet["groups"] if row["after"] < row["before"]]
        sheet["cut_groups"] = {"all": len(sheet["groups"]), "cut": len(lost)}
    return {name: plain(sheet[name]) for name in SECTIONS if sheet.get(name) not in (None, {}, [])}


# ---------------------------------------------------------------- from a job, a result, or the JSON of a job
def _of(done: Any) -> dict[str, Any]:
    if done is None:
        return {}
    result = getattr(done, "result", done)
    if isinstance(done, Mapping):
        known = dict(done)
    elif hasattr(done, "to_json") and hasattr(done, "result"):
        known = dict(done.to_json())
    elif hasattr(done, "plan") and hasattr(done, "proof"):
        known = {
            "model": type(done.model).__name__, "before": asdict(done.before), "after": asdict(done.after),
            "proof": done.proof.to_json(), "how": done.cut.how, "notes": done.notes, "why": done.plan.why,
        }  # fmt: skip
    else:
        raise InputError(f"facts() got a {type(done).__name__}.\n  Pass a Job, a Result, or what Job.to_json() returns.")
    why = dict(known.get("why") or {})
    rows = list(known.get("groups") or ())
    taken = ("model", "batch", "how", "proof", "notes", "repairs", "latency", "sensitivity", "pareto", "hardware")
    sheet = {name: known[name] for name in taken if known.get(name) is not None}
    sheet["versions"] = why.pop("versions", None)
    sheet["cost"] = _costs(known.get("before") or {}, known.get("after") or {})
    sheet["targets"] = list(why.get("achieved") or ()) or [{"asked": text, "limit": limit} for text, limit in _asked(why)]
    sheet["settings"] = {name: value for name, value in why.items() if name not in ("limits", "achieved", "trail")}
    sheet["groups"] = _groups(result, rows) if hasattr(result, "plan") else [_group(row) for row in rows]
    sheet["frozen"] = frozen_rows(getattr(getattr(result, "graph", None), "frozen", ()))
    sheet["accuracy"] = _stages(known.get("accuracy"), known.get("repairs") or known.get("masks") or getattr(result, "repairs", None))
    if getattr(result, "repairs", None) and "repairs" not in sheet:
        sheet["repairs"] = list(result.repairs)
    if known.get("masks"):  # single weights: what became of each layer reads like a repair
        sheet["repairs"] = list(known["masks"])
        sheet["cost"].append({"figure": "nonzero", "dense": why["of_parameters"], "pruned": why["of_parameters"] - why["of_weights"] + why["kept"]})
    if known.get("seconds"):  # what `secateur demo` adds: medians without their samples
        sheet["latency"] = [_summary(known["seconds"]["seconds"])]
    return sheet


def _costs(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"figure": figure, "dense": dense, "pruned": after.get(figure)} for figure, dense in before.items()]


def _asked(why: Mapping[str, Any]) -> list[tuple[str, Any]]:
    texts, limits = list(why.get("targets") or ()), list(why.get("limits") or ())
    return [(str(text), limits[i] if i < len(limits) else None) for i, text in enumerate(texts)]


def _groups(result: Any, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """All groups of the plan, those that lost nothing too."""
    saved = {row["name"]: row for row in rows}
    found = []
    for name, keep in result.plan.keep.items():
        group = result.graph.groups.get(name)
        row = {"name": name, "kind": group.kind if group is not None else "block", "before": len(keep), "after": int(keep.sum())}
        found.append({**row, **{k: saved[name][k] for k in ("macs_saved", "params_saved") if k in saved.get(name, {})}})
    return found


def _group(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `Job.to_json()`, which says units_before and units_after."""
    names = {"units_before": "before", "units_after": "after"}
    return {names.get(name, name): value for name, value in row.items()}


def frozen_rows(axes: Iterable[Any]) -> list[dict[str, Any]]:
    """One row per reason: a large network freezes thousands of axes for a handful of reasons."""
    reasons: dict[str, list[Any]] = defaultdict(list)
    for axis in axes:
        reasons[axis.reason].append(axis)
    rows = []
    for reason, held in sorted(reasons.items(), key=lambda item: -len(item[1])):
        places = list(dict.fromkeys(place for axis in held for place in axis.where))
        rows.append({"reason": reason, "axes": len(held), "sizes": sorted({a.size for a in held})[:EXAMPLES], "where": places[:EXAMPLES]})
    return rows


def _stages(values: Mapping[str, Any] | None, repairs: Any) -> dict[str, Any] | None:
    """{stage: accuracy} of a job. Its "repaired" is BatchNorm re-estimated as long as no layer was repaired."""
    if not values:
        return None
    rename = {} if repairs or "batch_norm" in values else {"repaired": "batch_norm"}
    return {rename.get(name, name): value for name, value in values.items()}


def _summary(seconds: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    dense, pruned = seconds["dense"], seconds["pruned"]
    sides = {name: {"rounds": side["rounds"], "median": side["median"]} for name, side in (("dense", dense), ("pruned", pruned))}
    return {"runtime": "torch", "threads": dense["threads"], "batch": dense["batch"], **sides}


# ---------------------------------------------------------------- figures that follow from others
def ratio(part: Any, whole: Any) -> float | None:
    """part / whole where both are finite numbers and whole is not 0, else None."""
    fine = [isinstance(v, (int, float)) and math.isfinite(v) for v in (part, whole)]
    return part / whole if all(fine) and whole else None


def _cost_rows(rows: Any, sheet: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"share": ratio(row.get("pruned"), row.get("dense")), **row} for row in rows]


def _target_rows(rows: Any, sheet: Mapping[str, Any]) -> list[dict[str, Any]]:
    costs = {row["figure"]: row for row in sheet.get("cost") or ()}
    done = []
    for row in rows:
        text = str(row.get("target", row.get("asked")))  # a row of `prune` names the target and says the budget asked beside it
        said = re.match(r"(\w+)\(at_most=['\"]?([^'\",)]+)", text)
        figure = row.get("figure") or (said[1].lower() if said else None)
        where = (row.get("settings") or {}).get("runtime")
        asked = f"{said[1]} at most {said[2]}{f' on {where}' if where else ''}" if said else text
        achieved = row.get("achieved", costs.get(figure, {}).get("pruned"))
        used = row.get("share", ratio(achieved, row.get("limit")))
        close = "ratio_spread" in row and used is not None and 1 < used <= MEASURED_WITHIN
        met = "within 5 %" if close else used <= 1 if used is not None else None
        done.append({"asked": asked, "figure": figure, "limit": row.get("limit"), "achieved": achieved, "used": row.get("used", used),
                     "met": row.get("met", met)})  # fmt: skip
    return done


def _repair_rows(rows: Any, sheet: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of this schema, or those of `repair`: plain, bias and repaired error, what was used and why."""
    done = []
    for row in rows:
        row = dict(row) if isinstance(row, Mapping) else asdict(row)
        if "plain" in row:
            row = {"layer": row["layer"], "kind": row.get("kind"), "rows": row.get("rows"), "error_cut": row["plain"],
                   "error_repaired": row.get("repaired"), "held_out": True, "used": row.get("used"),
                   "kept_plain": row.get("why") or None}  # fmt: skip
        done.append(row)
    return done


def _accuracy(given: Mapping[str, Any], sheet: Mapping[str, Any]) -> dict[str, Any]:
    if "stages" in given:
        stages = [dict(row) for row in given["stages"]]
    else:
        stages = [{"stage": name, "value": value} for name, value in given.items()]
    dense = next((row["value"] for row in stages if row["stage"] == "dense"), None)
    for row in stages:
        known = ratio(row["value"], 1) is not None and ratio(dense, 1) is not None
        row.setdefault("points", 100 * (row["value"] - dense) if known and row["stage"] != "dense" else None)
    return {"metric": given.get("metric", "accuracy") if "stages" in given else "accuracy", "rows": None, **(given if "stages" in given else {}),
            "stages": stages}  # fmt: skip


def _timed(rows: Any, sheet: Mapping[str, Any]) -> list[dict[str, Any]]:
    done = []
    for row in rows:
        dense, pruned = (_side(row.get(name)) for name in ("dense", "pruned"))
        part = row.get("ratio", ratio(pruned.get("median"), dense.get("median")))
        done.append({"ratio": part, "speedup": ratio(1, part), **row, "dense": dense, "pruned": pruned})
    return done


def _side(given: Any) -> dict[str, Any]:
    """Samples with their median and quartiles; samples that are not finite are no samples."""
    side = dict(given) if isinstance(given, Mapping) else {"samples": given or []}
    samples = [v for v in plain(side.get("samples")) or () if v is not None]
    if samples:
        low, middle, high = statistics.quantiles(samples, n=4, method="inclusive") if len(samples) > 1 else samples * 3
        side = {"median": middle, "low": low, "high": high, "rounds": len(samples), **side, "samples": samples}
    return side


def _energy(given: Mapping[str, Any], sheet: Mapping[str, Any]) -> dict[str, Any]:
    return {"share": ratio(given["pruned"].get("joules"), given["dense"].get("joules")), **given}


def _group_rows(rows: Any, sheet: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"share": ratio(row.get("after"), row.get("before")), **row} for row in rows]


def _pareto_rows(rows: Any, sheet: Mapping[str, Any]) -> list[dict[str, Any]]:
    dense = next((row["dense"] for row in sheet.get("cost") or () if row["figure"] == "macs"), None)
    return [{"share": ratio(row.get("macs"), dense), **row} for row in rows]


def _training(given: Mapping[str, Any], sheet: Mapping[str, Any]) -> dict[str, Any]:
    """With how far it is, 0..1, and the seconds that are left at the pace so far."""
    last = given["rows"][-1] if given.get("rows") else {"step": 0, "seconds": 0.0}
    done = ratio(last["step"], given.get("steps"))
    return {"done": done, "left": last["seconds"] * (1 - done) / done if done else None, **given}


_COMPLETE = {  # in this order: targets and pareto read the completed cost
    "cost": _cost_rows, "targets": _target_rows, "accuracy": _accuracy, "latency": _timed, "energy": _energy,
    "groups": _group_rows, "repairs": _repair_rows, "pareto": _pareto_rows, "training": _training,
}  # fmt: skip
