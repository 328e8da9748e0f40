"""Layer by layer: widths before and after, what could not be cut and why, and what the repair did."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.report import charts
from secateur.report.html import Html, count, element, error, error_text, finite, join, number, percent, percent_text
from secateur.report.summary import section, table

MOST_SHOWN = 30  # rows of a table before the rest is folded away
USUAL = (None, "least squares", "fit")  # needs no note
SAID = {"rectified": "fitted through its ReLU"}
FILTER_FROM = 12  # rows from which a box to search them is worth its place


def widths(facts: Mapping[str, Any]) -> Html | None:
    groups = facts.get("groups")
    if not groups and not facts.get("frozen"):
        return None
    most = max((row["before"] for row in groups or () if finite(row.get("before"))), default=1) or 1
    rows = [_width(row, most) for row in groups or ()]
    held = facts.get("cut_groups") or {}
    uncut = held.get("cut") == 0 and not facts.get("proof")  # nothing was to be cut: what `secateur inspect` found
    every, cut = count(held.get("all")), count(held.get("cut"))
    begin = join(every, " groups. ") if uncut else join(cut, " of ", every, " groups lost units. ")
    what = join(begin, "A group is the units that can only go together: a filter with its BatchNorm and what reads it, a head, a neuron.")
    lead = what if finite(held.get("all")) else None
    heads = ["group", "kind", "", "units", "kept"]
    body = folding("widths", table(heads, rows, "Units per group before and after", "widths"), len(rows), "groups") if rows else None
    return section("layers", "Widths", key() if rows and not uncut else None, body, _frozen(facts), lead=lead)


def key() -> Html:
    """Which colour is which."""
    return element("p", element("span", "", class_="key dense"), " dense ", element("span", "", class_="key pruned"), " pruned", class_="keys")


def _width(row: Mapping[str, Any], most: float) -> list[Any]:
    before, after, name = row.get("before"), row.get("after"), row.get("name")
    if not (finite(before) and finite(after)):
        return [name, row.get("kind"), "", count(None), percent(None)]
    words = f"{name}: {after:,} of {before:,} units kept ({percent_text(row.get('share'))})"
    for figure, label in (("macs_saved", "MACs"), ("params_saved", "parameters")):
        if finite(row.get(figure)):
            words += f", saves {row[figure]:,} {label}"
    drawn = charts.bar(after / most, words, "pruned", before / most)
    units = join(count(before), " → ", count(after)) if before != after else count(before)
    return [name, row.get("kind"), drawn, units, percent(row.get("share"))]


def folding(name: str, body: Html, rows: int, what: str) -> Html:
    """A table with a box to search it, and a button for the rows past the first thirty."""
    tools: list[Html] = []
    if rows >= FILTER_FROM:
        tools.append(element("label", "Filter ", element("input", type="search", placeholder="layer or kind", data_filter=name, autocomplete="off")))
    if rows > MOST_SHOWN:
        tools.append(element("button", f"Show all {rows:,} {what}", type="button", data_more=name, aria_expanded="false", aria_controls=name))
    head = element("div", tools, element("span", "", class_="found", role="status"), class_="tools") if tools else None
    return element("div", head, element("div", body, id=name, class_="folded" if rows > MOST_SHOWN else None), class_="folding")


def _frozen(facts: Mapping[str, Any]) -> Html | None:
    rows = []
    for row in facts.get("frozen") or ():
        places = [join(element("code", place), " ") for place in row.get("where") or ()]
        sizes = join(*[join(", " if i else "", number(size, f"{size}")) for i, size in enumerate(row.get("sizes") or ())])
        rows.append([row.get("reason"), count(row.get("axes")), sizes, join(places)])
    if not rows:
        return None
    inner = table(["why it stays", "axes", "of sizes", "for example"], rows, "Axes that keep all their units", "stack prose")
    return element("details", element("summary", "What was not cut, and why"), inner, class_="more")


def repairs(facts: Mapping[str, Any]) -> Html | None:
    held = facts.get("repairs")
    if not held:
        return None
    errors = [row.get(name) for row in held for name in ("error_cut", "error_repaired")]
    most = max((value for value in errors if finite(value)), default=1.0) or 1.0
    rows = [_repair(row, most) for row in held]
    kind = "kind" if any(row.get("kind") for row in held) else ""
    heads = ["layer", kind, "", "plain cut", "repaired", "rows", "note"]
    lead = ("How far each layer's output is from the dense model's, relative to it: after the plain cut, and after the closed-form repair. "
            "Errors are on rows held out of the fit; a layer where the repair would hurt there keeps its plain cut.")  # fmt: skip
    marks = element("p", element("span", "", class_="key ring"), " plain cut ", element("span", "", class_="key disc"), " repaired", class_="keys")
    body = table(heads, rows, "Error of each layer before and after repair", "widths repairs")
    return section("repairs", "Repair", marks, folding("repair-rows", body, len(rows), "layers"), lead=lead)


def _repair(row: Mapping[str, Any], most: float) -> list[Any]:
    cut, repaired = row.get("error_cut"), row.get("error_repaired")
    scaled = [value / most if finite(value) else None for value in (cut, repaired)]
    words = f"{row.get('layer')}: error {error_text(cut)} plainly cut, {error_text(repaired)} repaired"
    branch = row.get("used") == "gauss-newton"
    notes = [SAID.get(row["used"], f"{row['used']} used")] if row.get("used") not in USUAL and not branch else []
    notes += ["fitted as a whole; before that its layers one by one"] if branch else []
    notes += [str(row["kept_plain"])] if row.get("kept_plain") else []
    notes += ["on the rows it was fitted to"] if row.get("held_out") is False else []
    return [row.get("layer"), row.get("kind"), charts.dumbbell(scaled[0], scaled[1], words), error(cut), error(repaired), count(row.get("rows")),
            "; ".join(notes)]  # fmt: skip
