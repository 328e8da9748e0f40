"""What an advice found: loss against time and against bytes, every point as a row, and the command that makes each again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.report import charts
from secateur.report.charts import Axis, Scale
from secateur.report.html import (
    Html,
    element,
    finite,
    join,
    number,
    percent,
    percent_text,
    seconds,
    size,
    size_text,
)
from secateur.report.summary import section, table

COLOURS = {"dense": "c3", "int8": "c1", "structures": "c0", "neurons": "c5", "weights": "c2", "patterns": "c4"}
MOST = 10.0  # points lost at the top of a picture; what loses more stands at its edge


def advice(facts: Mapping[str, Any]) -> Html | None:
    held = facts.get("advice")
    if not held:
        return None
    known = [{"name": "dense", "way": "dense", **held["dense"]}, *[row for row in held["rows"] if row["state"] == "measured"]]
    metric = held.get("metric")
    up = "squared error, % of the variance" if metric == "error" else f"points of {metric} lost, lower is better"
    rows = join(number(held["held_out"], f"{held['held_out']:,}"), " held-out rows")
    lead = join("Compared on ", rows, ", timed in turns with the dense model. Grey: another loses no more, is no slower and no larger.")
    pictures = _key(known), _picture(known, "ratio", up), _picture(known, "bytes", up)
    return section("advice", "What pays here", *pictures, _table(known), _left(held["rows"]), _commands(held["rows"]), lead=lead)


def _key(rows: list[Mapping[str, Any]]) -> Html:
    ways = dict.fromkeys(str(row["way"]) for row in rows)
    dots = []
    for way in ways:
        circle = element("circle", class_=f"mark {COLOURS.get(way, 'c0')}", cx="50%", cy="50%", r=5)
        dots.append(join(element("svg", circle, class_="spot", aria_hidden="true"), element("span", way)))
    return element("p", dots, class_="keys")


def _picture(rows: list[Mapping[str, Any]], across: str, up: str) -> Html:
    """Points lost against a figure; the line joins what nothing beats in these two."""
    points = sorted((row for row in rows if finite(row.get(across)) and finite(row.get("lost"))), key=lambda row: (row[across], row["lost"]))
    each, unit = _unit([row[across] for row in points]) if across == "bytes" else (1, "")
    label, text, tick = {
        "ratio": ("time of one call, of the dense model", percent_text, lambda v: f"{100 * v:.0f} %"),
        "bytes": (f"on disk, {unit}", size_text, lambda v: f"{v:.4g}"),
    }[across]  # fmt: skip
    x = Axis(Scale.over([row[across] / each for row in points]), tick, label)
    top = min(MOST, max([row["lost"] for row in points] + [1.0]))
    y = Axis(Scale.over([top, min([row["lost"] for row in points] + [0.0])], zero=False), lambda v: f"{v:.3g}", up)
    best, line = float("inf"), []
    for row in points:
        if row["lost"] < best:
            best = row["lost"]
            line.append((row[across] / each, row["lost"]))
    dots = [_dot(row, (row[across] / each, row["lost"]), x, y, f"{row['name']}: {text(row[across])}, {_lost(row)} lost") for row in points]
    return charts.plot(x, y, [charts.curve(line, x, y, "line front"), *dots], f"{up}, against {label}, {len(points)} points")


def _unit(values: list[float]) -> tuple[int, str]:
    """The largest unit of bytes that the most of them holds, so that the ticks are round."""
    most = max(values, default=0)
    return next((pair for pair in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")) if most >= pair[0]), (1, "B"))


def _dot(row: Mapping[str, Any], at: tuple[float, float], x: Axis, y: Axis, words: str) -> Html:
    colour = COLOURS.get(str(row["way"]), "c0")
    return charts.dot(at, x, y, words, f"{colour} chosen" if row.get("front") else f"{colour} beaten")


def _lost(row: Mapping[str, Any]) -> str:
    return f"{row['lost']:.2f} ± {row['interval']:.2f}" if finite(row.get("interval")) else f"{row['lost']:.2f} ± unknown"


def _table(rows: list[Mapping[str, Any]]) -> Html:
    body = []
    for row in rows:
        name = element("strong", row["name"]) if row.get("front") else element("span", row["name"], class_="muted")
        spread = f" ± {100 * row['spread']:.1f}" if finite(row.get("spread")) else ""
        body.append([name, number(row["lost"], _lost(row)), join(percent(row.get("ratio")), spread), seconds(row.get("seconds")), row.get("runtime"),
                     size(row.get("bytes")), size(row.get("peak_bytes")), seconds(row["took"]) if row.get("took") else ""])  # fmt: skip
    heads = ["point", "lost", "of dense", "time", "runs on", "on disk", "peak memory", "took"]
    return table(heads, body, "Every point that was measured; those nothing beats are bold", "stack")


def _left(rows: list[Mapping[str, Any]]) -> Html | None:
    left = [row for row in rows if row["state"] != "measured"]
    if not left:
        return None
    body = table(["point", "why it has no figures"], [[row["name"], f"{row['state']}: {row['why']}"] for row in left], "What has no figures", "prose")
    return element("details", element("summary", "Refused, failed or not tried"), body, class_="more")


def _commands(rows: list[Mapping[str, Any]]) -> Html | None:
    lines = [line for row in rows if row["state"] == "measured" for line in (f"# {row['name']}", *row["commands"])]
    if not lines:
        return None
    box = element("pre", element("code", "\n".join(lines)), tabindex="0", id="commands", aria_label="Commands that make every point again")
    copy = element("button", "Copy", type="button", class_="copy", data_copy="commands")
    return element("div", element("h3", "The commands"), element("div", box, copy, class_="copyable"), class_="part")

