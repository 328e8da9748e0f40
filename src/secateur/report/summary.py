"""The top of the page: the verdict, what it cost before and after, what was asked, the accuracy, the proof."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.report import charts
from secateur.report.html import (
    MISSING,
    Html,
    count,
    count_text,
    element,
    error,
    finite,
    join,
    joules,
    number,
    percent,
    percent_text,
    points,
    seconds,
    seconds_text,
    size,
    size_text,
    times,
)

FIGURES = {  # figure: its name, how it reads as an element and as text
    "macs": ("MACs", count, count_text), "params": ("parameters", count, count_text), "bytes": ("bytes", size, size_text),
    "nonzero": ("parameters that are not zeroed", count, count_text),
    "peak_bytes": ("peak memory", size, size_text), "peak_memory": ("peak memory", size, size_text), "latency": ("latency", seconds, seconds_text),
    "seconds": ("latency", seconds, seconds_text),
}  # fmt: skip
STAGES = {
    "dense": "dense", "cut": "as cut", "batch_norm": "BatchNorm re-estimated", "repaired": "repaired", "pruned": "pruned", "trained": "trained back",
}  # fmt: skip


def figure(name: Any) -> tuple:
    """Name, element and text of a figure; one this version does not know is a plain number."""
    return FIGURES.get(str(name), (str(name), count, count_text))


def section(key: str, title: str, *children: Any, lead: Any = None) -> Html:
    """A card of the page with its heading; `lead` is the sentence below it."""
    said = element("p", lead, class_="lead") if lead is not None else None
    return element("section", element("h2", title, id=f"{key}-title"), said, *children, id=key, aria_labelledby=f"{key}-title")


def table(heads: list[Any], rows: list[list[Any]], caption: str, class_: str = "") -> Html:
    """A table; the first cell of each row is its header. Roles are written out: on a phone rows become grids."""
    names = [element("th", head, scope="col", role="columnheader") for head in heads]
    body = []
    for row in rows:
        cells = [element("th", row[0], scope="row", role="rowheader")]
        cells += [element("td", cell, role="cell", data_label=head) for cell, head in zip(row[1:], heads[1:], strict=True)]
        body.append(join(element("tr", cells, role="row"), "\n"))
    return element(
        "table", element("caption", caption),
        element("thead", element("tr", names, role="row"), role="rowgroup"),
        element("tbody", body, role="rowgroup"), role="table", class_=class_ or None,
    )  # fmt: skip


# ---------------------------------------------------------------- the header
def header(facts: Mapping[str, Any]) -> Html:
    proof = facts.get("proof") or {}
    met = [row.get("met") for row in facts.get("targets") or ()]
    good = proof.get("passed", True) and False not in met
    words = "proven" if proof.get("passed") and good else "not proven" if proof.get("passed") is False else "target missed" if not good else "report"
    badge = element("span", element("span", "✓" if good else "!", aria_hidden="true"), " ", words, class_=f"badge {'good' if good else 'bad'}")
    costs = list(facts.get("cost") or ())
    changed = [row for row in costs if row.get("share") != 1]  # single weights that are zeroed leave all other figures as they are
    tiles = [_tile(row) for row in changed or costs] + _tiles_measured(facts)
    return element(
        "header",
        element("p", "secateur report", class_="brand"),
        element("h1", facts.get("model") or "A pruned model", *((" ", badge) if words != "report" else ())),
        element("p", verdict(facts), class_="verdict"),
        element("ul", tiles, class_="tiles") if tiles else None,
    )  # fmt: skip


def verdict(facts: Mapping[str, Any]) -> Html:
    """One sentence: what is left, what it can still do, how fast, and whether it is proven."""
    parts: list[Html] = []
    costs: dict[str, Mapping[str, Any]] = {str(row.get("figure")): row for row in facts.get("cost") or ()}
    macs, nonzero = costs.get("macs", {}), costs.get("nonzero", {})
    if finite(nonzero.get("share")):
        parts.append(join("keeps ", percent(nonzero["share"]), " of its parameters from being zero"))
    elif finite(macs.get("share")):
        parts.append(join("keeps ", percent(macs["share"]), " of its multiply-accumulates"))
    stages = _measured_stages(facts)
    if len(stages) > 1:
        first, last = stages[0], stages[-1]
        metric = facts["accuracy"].get("metric") or "accuracy"
        parts.append(join("has ", percent(last["value"]), f" {metric} where {'the dense model has' if first['stage'] == 'dense' else 'it had'} ",
                          percent(first["value"])))  # fmt: skip
    fast = next((row for row in facts.get("latency") or () if finite(row.get("speedup"))), None)
    if fast is not None:
        parts.append(join("runs ", times(fast["speedup"]), f" as fast on {fast.get('runtime', 'this machine')}"))
    proof = facts.get("proof")
    if proof:
        was = "was" if proof.get("passed") else "was NOT"  # as cut: what a repair changes afterwards is no part of the proof
        parts.append(join(f"{was} proven, as cut, against the masked original"))
    if not parts:
        return _of_many(facts)
    sentence = join("The pruned model ", parts[0])
    for n, part in enumerate(parts[1:], 2):
        sentence = join(sentence, " and " if n == len(parts) else ", ", part)
    return join(sentence, ".")


def _of_many(facts: Mapping[str, Any]) -> Html:
    """A report of no single cut: a sweep, or the sensitivity of the groups."""
    if advised := (facts.get("advice") or {}).get("verdict"):
        return join(" ".join(advised))
    cuts = [row["share"] for row in facts.get("pareto") or () if finite(row.get("share")) and row["share"] < 1]
    if cuts:
        between = join("from ", percent(min(cuts)), " to ", percent(max(cuts))) if len(cuts) > 1 else join("at ", percent(cuts[0]))
        return join("A sweep of ", count(len(cuts)), " budgets" if len(cuts) > 1 else " budget", ", ", between, " of the multiply-accumulates.")
    groups = facts.get("sensitivity") or ()
    return join("What is lost where each of ", count(len(groups)), " groups alone is cut.") if groups else join("Nothing was measured.")


def _tile(row: Mapping[str, Any]) -> Html:
    name, form, text = figure(row.get("figure"))
    dense, pruned, share = row.get("dense"), row.get("pruned"), row.get("share")
    words = f"{name}: {text(dense)} dense, {text(pruned)} pruned"
    if pruned is None:
        return element("li", element("h3", name), element("p", form(dense), class_="big"))
    return element("li", element("h3", name), element("p", percent(share), class_="big"), charts.bar(share, words),
                   element("p", form(dense), " → ", form(pruned), class_="small"))  # fmt: skip


def _tiles_measured(facts: Mapping[str, Any]) -> list[Html]:
    tiles = []
    stages = _measured_stages(facts)
    if stages:
        first, last = stages[0], stages[-1]
        words = f"{STAGES.get(last['stage'], last['stage'])}: {percent_text(last['value'])}"
        tiles.append(element("li", element("h3", facts["accuracy"].get("metric") or "accuracy"), element("p", percent(last["value"]), class_="big"),
                             charts.bar(last["value"], words, "accent"),
                             element("p", percent(first["value"]), " → ", percent(last["value"]), class_="small")))  # fmt: skip
    for row in (facts.get("latency") or ())[:2]:
        if finite(row.get("ratio")):
            dense, pruned = row["dense"].get("median"), row["pruned"].get("median")
            words = f"{row.get('runtime')}: {seconds_text(dense)} dense, {seconds_text(pruned)} pruned"
            tiles.append(element("li", element("h3", f"time, {row.get('runtime', '')}"), element("p", percent(row["ratio"]), class_="big"),
                                 charts.bar(row["ratio"], words), element("p", seconds(dense), " → ", seconds(pruned), class_="small")))  # fmt: skip
    return tiles


def _measured_stages(facts: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in (facts.get("accuracy") or {}).get("stages") or () if finite(row.get("value"))]


# ---------------------------------------------------------------- sections
def costs(facts: Mapping[str, Any]) -> Html | None:
    rows = []
    for row in facts.get("cost") or ():
        name, form, _ = figure(row.get("figure"))
        rows.append([name, form(row.get("dense")), form(row.get("pruned")), percent(row.get("share"))])
    for row in facts.get("latency") or ():
        rows.append([f"median time, {row.get('runtime', '')}", seconds(row["dense"].get("median")),
                     seconds(row["pruned"].get("median")), percent(row.get("ratio"))])  # fmt: skip
    used = facts.get("energy")
    said = None
    if used:
        sides = [joules(used[side].get("joules")) for side in ("dense", "pruned")]
        rows.append([f"energy, {used.get('kind')}", *sides, percent(used.get("share"))])
        said = element("p", f"Energy of one call: {used.get('source')}. Not in it: {used.get('leaves_out')}.", class_="lead small")
    if not rows:
        return None
    batch = facts.get("batch")
    lead = join("Multiply-accumulates are those of one call with a batch of ", number(batch, f"{batch}"), ".") if finite(batch) else None
    if not facts.get("latency") and not used and all(row.get("pruned") is None for row in facts["cost"]):
        return section("cost", "Cost", table(["", "dense"], [row[:2] for row in rows], "Cost of the dense model"), lead=lead)
    body = table(["", "dense", "pruned", "of dense"], rows, "Cost of the dense and of the pruned model", "three")
    return section("cost", "Before and after", body, said, lead=lead)


def targets(facts: Mapping[str, Any]) -> Html | None:
    rows = []
    for row in facts.get("targets") or ():
        _, form, text = figure(row.get("figure"))
        used = row.get("used")
        words = f"{text(row.get('achieved'))} of {text(row.get('limit'))} allowed"
        rows.append([row.get("asked"), form(row.get("limit")), form(row.get("achieved")),
                     element("div", charts.bar(used, words), percent(used), class_="with-bar"), _met(row.get("met"))])  # fmt: skip
    if not rows:
        return None
    heads = ["asked", "allowed", "achieved", "used of it", "target"]
    return section("targets", "Asked and achieved", table(heads, rows, "What was asked and what was reached", "stack"))


def _met(met: Any) -> Any:
    if met is None:
        return MISSING
    word = "missed" if met is False else "met" if met is True else met
    sign = element("span", "! " if met is False else "✓ ", class_="no" if met is False else "yes", aria_hidden="true")
    return element("span", sign, word)


def accuracy(facts: Mapping[str, Any]) -> Html | None:
    held = facts.get("accuracy")
    if not held or not held.get("stages"):
        return None
    rows = []
    for row in held["stages"]:
        name, value = STAGES.get(row.get("stage"), row.get("stage")), row.get("value")
        kind = "dense" if row.get("stage") == "dense" else "accent"
        beside = points(row["points"]) if finite(row.get("points")) else ""
        rows.append([name, charts.bar(value if finite(value) else None, f"{name}: {percent_text(value)}", kind), percent(value), beside])
    tested = join("Measured on ", count(held["rows"]), " test rows. ") if finite(held.get("rows")) else None
    lead = join(tested, "Points are percentage points beside the dense model.")
    metric = str(held.get("metric") or "accuracy")
    body = table(["stage", "", metric, "points"], rows, f"{metric} stage by stage", "bars")
    return section("accuracy", metric[:1].upper() + metric[1:], body, lead=lead)


def proof(facts: Mapping[str, Any]) -> Html | None:
    held = facts.get("proof")
    if not held:
        return None
    passed = held.get("passed")
    word = join(element("span", "✓ " if passed else "! ", class_="yes" if passed else "no", aria_hidden="true"),
                "The proof passed." if passed else "The proof did not pass.")  # fmt: skip
    zero = " Every output was zero on these inputs, so the comparison saw nothing." if held.get("all_zero") else ""
    lead = "The pruned model was run beside the original with the same units or weights masked, both in float64, before any repair." + zero
    rows = [["largest relative deviation", error(held.get("max_error"))], ["accepted at most", error(held.get("tolerance"))]]
    return section("proof", "Proof", element("p", word, class_="strong"), table(["", "value"], rows, "The proof in numbers", "facts"), lead=lead)
