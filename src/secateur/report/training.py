"""A training run as it goes: losses and accuracies epoch by epoch, and what a report of the folder that is trained goes on to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    percent,
    percent_text,
    seconds,
)
from secateur.report.summary import section, table

# What training does not change: widths and zeros are those of the folder that is trained. Times and accuracies are not.
CARRIED = ("model", "batch", "how", "cost", "targets", "groups", "cut_groups", "frozen", "repairs", "proof")
LINES = {"loss": "training", "valid_loss": "validation"}


def carried(known: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of the report of a pruned folder that stay true while its model is trained on. Its command is among the settings."""
    settings = {("pruned_with" if name == "command" else name): value for name, value in (known.get("settings") or {}).items()}
    return {**{name: known[name] for name in CARRIED if known.get(name) is not None}, "settings": settings}


def running(facts: Mapping[str, Any]) -> bool:
    """Whether the page is of a training that is not through."""
    held = facts.get("training") or {}
    return finite(held.get("done")) and held["done"] < 1


# ---------------------------------------------------------------- the section
def training(facts: Mapping[str, Any]) -> Html | None:
    held = facts.get("training")
    if not held:
        return None
    rows = list(held.get("rows") or ())
    lead = None
    if running(facts):
        left = join("; about ", seconds(held["left"]), " are left") if finite(held.get("left")) else ""
        lead = join(percent(held["done"]), " of the training is done", left, ". This page loads itself anew.")
    every = [point["step"] for point in rows]
    x = Axis(Scale.over([*every, held.get("steps")]), count_text, "steps of the optimizer")
    parts = [_losses(rows, x), _accuracies(rows, x)] if rows else [element("p", "No epoch is through yet.", class_="lead")]
    return section("training", "Training", *parts, _table(rows) if rows else None, lead=lead)


def _losses(rows: Sequence[Mapping[str, Any]], x: Axis) -> Html | None:
    known = {name: _points(rows, name) for name in LINES}
    values = [value for points in known.values() for _, value in points]
    if not values:
        return None
    y = Axis(Scale.over(values, log=True), error_text, "loss, lower is better")
    drawn = [(LINES[name], points) for name, points in known.items() if points]
    series = [_line(n, name, points, (x, y), error_text) for n, (name, points) in enumerate(drawn)]
    chart = charts.plot(x, y, series, f"Loss after every epoch, {len(rows)} epochs; arrow keys move from point to point")
    return element("div", element("div", chart, id="losses"), charts.legend([name for name, _ in drawn], len(drawn), "losses"), class_="part")


def _accuracies(rows: Sequence[Mapping[str, Any]], x: Axis) -> Html | None:
    points = _points(rows, "valid")
    if not points:
        return None
    y = Axis(Scale.over([value for _, value in points], zero=False, most=1.0), lambda v: f"{100 * v:.4g} %", "validation accuracy, higher is better")
    line = _line(1, "validation", points, (x, y), percent_text)
    label = f"Accuracy after every epoch, {len(points)} epochs; arrow keys move from point to point"
    return element("div", charts.plot(x, y, line, label), class_="part")


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(row["step"], row[name]) for row in rows if finite(row.get(name))]


def _line(n: int, name: str, points: list[tuple[float, float]], axes: tuple[Axis, Axis], text: Any) -> Html:
    x, y = axes
    dots = [charts.dot(point, x, y, f"{name}, step {point[0]:,.0f}: {text(point[1])}", charts.colour(n)) for point in points]
    return element("g", charts.curve(points, x, y, f"line {charts.colour(n)}"), dots, data_series=n)


def _table(rows: Sequence[Mapping[str, Any]]) -> Html:
    measured = [name for name in ("valid_loss", "valid") if any(finite(row.get(name)) for row in rows)]
    heads = ["epoch", "step", "loss", *({"valid_loss": "validation loss", "valid": "accuracy"}[name] for name in measured), "rate", "time so far"]
    forms = {"valid_loss": error, "valid": percent}
    body = [[count(row["epoch"]), count(row["step"]), error(row.get("loss")), *(forms[name](row.get(name)) for name in measured),
             error(row.get("lr")), seconds(row.get("seconds"))] for row in rows]  # fmt: skip
    return element("details", element("summary", "The same as a table"), table(heads, body, "Training, every epoch", "stack"), class_="more")
