"""What was measured over a range: sensitivity of the groups, the Pareto front, the rounds of the timings."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from secateur.report import charts
from secateur.report.charts import Axis, Scale
from secateur.report.html import (
    Html,
    count,
    count_text,
    element,
    error,
    error_text,
    finite,
    join,
    number,
    percent,
    percent_text,
    seconds,
    seconds_text,
    seconds_tick,
    times,
)
from secateur.report.summary import section, table

LINES, DRAWN = 8, 120  # lines shown at first, and lines drawn at all: more would be neither read nor fast


# ---------------------------------------------------------------- sensitivity
def sensitivity(facts: Mapping[str, Any]) -> Html | None:
    held = [(row, _curve(row)) for row in facts.get("sensitivity") or ()]
    held = sorted((pair for pair in held if pair[1]), key=lambda pair: -max(point["error"] for point in pair[1]))
    if not held:
        return None
    lines = held[:DRAWN]
    errors = [point["error"] for _, points in lines for point in points]
    x = Axis(Scale(0.0, 1.0), lambda v: f"{100 * v:.0f} %", "units kept")
    y = Axis(Scale.over(errors), error_text, "relative error")
    series = [_line(n, row, points, x, y) for n, (row, points) in enumerate(lines)]
    label = f"Error against units kept, {len(lines)} groups; arrow keys move from point to point"
    left = None
    if len(held) > DRAWN:
        left = element("p", "Only the most sensitive groups are drawn; report.json holds all.", class_="lead")
    chart = element("div", charts.plot(x, y, series, label), id="curves")
    names = charts.legend([str(row.get("group")) for row, _ in lines], LINES, "curves")
    lead = "What is lost when one group alone is cut, the most sensitive groups first. Click a name to show or hide its line."
    return section("sensitivity", "Sensitivity", chart, names, left, _curve_table(lines), lead=lead)


def _curve(row: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """The points that are known, from few units to many."""
    known = [point for point in row.get("points") or () if finite(point.get("kept")) and finite(point.get("error"))]
    return sorted(known, key=lambda point: point["kept"])


def _line(n: int, row: Mapping[str, Any], points: list[Mapping[str, Any]], x: Axis, y: Axis) -> Html:
    colour = charts.colour(n)
    places = [(point["kept"], point["error"]) for point in points]
    dots = []
    for point, place in zip(points, places, strict=True):
        words = f"{row.get('group')}: {percent_text(point['kept'])} of the units kept, error {error_text(point['error'])}"
        if finite(point.get("macs")):
            words += f", {count_text(point['macs'])} MACs"
        dots.append(charts.dot(place, x, y, words, colour))
    hidden = "off" if n >= LINES else None
    return element("g", charts.curve(places, x, y, f"line {colour}"), dots, data_series=n, class_=hidden)


def _curve_table(lines: list[tuple[Mapping[str, Any], list[Mapping[str, Any]]]]) -> Html:
    rows = [[row.get("group"), percent(point["kept"]), count(point.get("macs")), error(point["error"])] for row, points in lines for point in points]
    inner = table(["group", "units kept", "MACs", "error"], rows, "Sensitivity, every point", "stack")
    return element("details", element("summary", "The same as a table"), inner, class_="more")


# ---------------------------------------------------------------- the Pareto front
def pareto(facts: Mapping[str, Any]) -> Html | None:
    held = facts.get("pareto") or []
    if not held:
        return None
    across = "share" if any(finite(row.get("share")) for row in held) else "macs" if any(finite(row.get("macs")) for row in held) else "seconds"
    up = "accuracy" if any(finite(row.get("accuracy")) for row in held) else "kl"
    points = sorted((row for row in held if finite(row.get(across)) and finite(row.get(up))), key=lambda row: row[across])
    chart = _front(points, across, up) if points else None
    rows = [[join(row.get("label"), element("strong", " (this model)") if row.get("chosen") else None), percent(row.get("share")),
             count(row.get("macs")), count(row.get("params")), seconds(row.get("seconds")), percent(row.get("accuracy")), error(row.get("kl"))]
            for row in held]  # fmt: skip
    heads = ["point", "of dense", "MACs", "parameters", "time", "accuracy", "KL"]
    return section("pareto", "Pareto front", chart, table(heads, rows, "Every point of the sweep", "stack"),
                   lead="What each budget costs in quality. The line joins those that no cheaper one equals. KL is the divergence from the dense "
                        "model's output.")  # fmt: skip


def _front(points: list[Mapping[str, Any]], across: str, up: str) -> Html:
    names = {"share": ("MACs, of dense", percent_text, lambda v: f"{100 * v:.0f} %"), "macs": ("MACs", count_text, count_text),
             "seconds": ("time of one call", seconds_text, seconds_tick)}  # fmt: skip
    ups = {"accuracy": ("accuracy, higher is better", percent_text, lambda v: f"{100 * v:.4g} %"),
           "kl": ("KL, lower is better", error_text, error_text)}  # fmt: skip
    (x_label, x_text, x_tick), (y_label, y_text, y_tick) = names[across], ups[up]
    x = Axis(Scale.over([row[across] for row in points]), x_tick, x_label)
    y = Axis(Scale.over([row[up] for row in points], zero=up == "kl", log=up == "kl", most=math.inf if up == "kl" else 1.0), y_tick, y_label)
    front = unbeaten([(row[across], row[up]) for row in points], up == "accuracy")
    dots = []
    for row in points:
        place = (row[across], row[up])
        words = f"{row.get('label')}: {x_text(row[across])}, {up} {y_text(row[up])}"
        words += "" if place in front else "; another point costs less and is as good"
        dots.append(charts.dot(place, x, y, words, "c1 chosen" if row.get("chosen") else "c0" if place in front else "beaten"))
    line = charts.curve(front, x, y, "line c0 d0")
    return charts.plot(x, y, [line, *dots], f"{y_label}, against {x_label}, {len(points)} points; arrow keys move from point to point")


def unbeaten(points: list[tuple[float, float]], more: bool) -> list[tuple[float, float]]:
    """Of points by rising cost those that are better than every cheaper one; `more`: a higher value is better."""
    front: list[tuple[float, float]] = []
    for cost, value in points:
        if not front or (value > front[-1][1] if more else value < front[-1][1]):
            if front and front[-1][0] == cost:
                front.pop()
            front.append((cost, value))
    return front


# ---------------------------------------------------------------- latency
def latency(facts: Mapping[str, Any]) -> Html | None:
    held = facts.get("latency")
    if not held:
        return None
    dots = any((row.get(name) or {}).get("samples") for row in held for name in ("dense", "pruned"))
    lead = "Dense and pruned took turns, so both saw the same machine. The bars end at the median."
    lead += " One dot is one round; the box spans the quartiles." if dots else ""
    return section("latency", "Latency", [_runtime(row) for row in held], lead=lead)


def _runtime(row: Mapping[str, Any]) -> Html:
    runtime = str(row.get("runtime", ""))
    parts = [number(row[name], f"{word} {row[name]:,}") for name, word in (("batch", "batch"), ("threads", "threads")) if finite(row.get(name))]
    parts += [element("span", row["dtype"])] if row.get("dtype") else []
    heading = element("h3", runtime, " ", element("span", [join(" · ", part) for part in parts], class_="muted"))
    sides = [(name, row.get(name) or {}) for name in ("dense", "pruned")]
    every = [value for _, side in sides for value in (*(side.get("samples") or ()), side.get("median"))]
    x = Axis(Scale.over(every), seconds_tick, "time of one call")
    label = f"Times of every round on {runtime}; arrow keys move from round to round"
    chart = charts.strips([_side(name, side) for name, side in sides], x, seconds_text, label) if any(map(finite, every)) else None
    rows = [[name, seconds(side.get("median")), join(seconds(side.get("low")), " to ", seconds(side.get("high"))), count(side.get("rounds"))]
            for name, side in sides]  # fmt: skip
    heads = ["", "median", "quartiles", "rounds"]
    if not any(side.get("samples") for _, side in sides):  # then there are no quartiles to show
        heads, rows = [heads[0], heads[1], heads[3]], [[row[0], row[1], row[3]] for row in rows]
    fast = element("p", "The pruned model is ", element("strong", times(row["speedup"])), " as fast.") if finite(row.get("speedup")) else None
    return element("div", heading, fast, chart, table(heads, rows, f"Time of one call, {runtime}", "three"), class_="part")


def _side(name: str, side: Mapping[str, Any]) -> charts.Strip:
    middle, low, high = (seconds_text(side.get(figure)) for figure in ("median", "low", "high"))
    words = f"{name}: median {middle}, half of the rounds between {low} and {high}"
    samples = [value for value in side.get("samples") or () if finite(value)]
    return charts.Strip(name, name, samples, side.get("median"), side.get("low"), side.get("high"), words)
