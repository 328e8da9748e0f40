"""Inline SVG that needs no scaling: positions are percentages of the figure's own width, so text keeps its size on a phone.

A mark that says something when pointed at is a `mark`: it can be focused and carries its words in a `<title>`; the page's
script turns that into a tooltip, and without the script the browser shows it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.report.html import Html, element, finite, join

COLOURS, DASHES = 6, 3  # the style sheet has six colours told apart by everyone, and three dashes


@dataclass(frozen=True)
class Scale:
    """Numbers to 0..100 along one side of a figure; `log` for values over several powers of ten."""

    low: float
    high: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[Any], *, zero: bool = True, log: bool = False, most: float = math.inf) -> Scale:
        """A scale that holds every finite value. With `log`, logarithmic where they span more than four powers of ten. It ends at `most`, where
        the values do: nobody is right about more than 100 %."""
        known = [float(v) for v in values if finite(v)]
        positive = [v for v in known if v > 0]
        if log and positive and max(positive) > 1e4 * min(positive):
            return cls(10.0 ** math.floor(math.log10(min(positive))), max(positive), True)
        low, high = (min(known), max(known)) if known else (0.0, 1.0)
        low = min(low, 0.0) if zero else low
        if high - low <= 1e-12 * max(abs(high), abs(low)):
            low, high = low - (abs(low) or 1.0) * (0 if zero else 0.1), high + (abs(high) or 1.0) * 0.1
        room = 0.04 * (high - low)
        return cls(low if zero else low - room, high + room if max(known, default=0.0) > most else min(high + room, most))

    def at(self, value: float) -> float:
        """0..100; values outside stand at the edge."""
        if self.log:
            value = max(value, self.low)
            share = (math.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        else:
            share = (value - self.low) / (self.high - self.low)
        return 100 * min(1.0, max(0.0, share))

    def ticks(self, about: int = 5) -> list[float]:
        """Round numbers within the scale."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**n for n in range(first, last + 1, max(1, (last - first + 1) // about))]
        rough = (self.high - self.low) / about
        power = 10.0 ** math.floor(math.log10(rough))
        step = next(power * n for n in (1, 2, 2.5, 5, 10) if power * n >= rough * 0.999)
        first = math.ceil(self.low / step - 1e-9)
        return [step * n for n in range(first, int(self.high / step + 1e-9) + 1)]


@dataclass(frozen=True)
class Axis:
    """A scale, how its ticks read, and what it measures."""

    scale: Scale
    text: Callable[[float], str]
    label: str


def mark(shape: str, words: str, class_: str = "mark", **attributes: Any) -> Html:
    """A shape that can be pointed at and focused, and what it then says."""
    return element(shape, element("title", words), class_=class_, tabindex="-1", role="img", **attributes)


def bar(share: float | None, words: str, class_: str = "pruned", ghost: float | None = None) -> Html:
    """A horizontal bar, its length a fraction of the whole: over a track, or over the paler bar `ghost`."""
    shapes = []
    for length, kind in ((1.0, "track") if ghost is None else (ghost, "dense"), (share, class_)):
        if length is not None and finite(length):
            shapes.append(element("rect", class_=kind, width=f"{100 * min(1.0, max(0.0, length)):.3f}%", height="100%", rx=3))
    return element("svg", element("title", words), shapes, class_="bar", role="img", aria_label=words, tabindex="-1")


def dumbbell(first: float | None, second: float | None, words: str) -> Html:
    """Two values of one row on a shared track: a hollow dot, a full one, and the way between."""
    at = [None if v is None or not finite(v) else 2 + 96 * min(1.0, max(0.0, v)) for v in (first, second)]
    shapes = [element("line", class_="rail", x1="0", x2="100%", y1="50%", y2="50%")]
    if None not in at:
        shapes.append(element("line", class_="way", x1=f"{at[0]:.3f}%", x2=f"{at[1]:.3f}%", y1="50%", y2="50%"))
    for x, kind in zip(at, ("hollow", "full"), strict=True):
        if x is not None:
            shapes.append(element("circle", class_=kind, cx=f"{x:.3f}%", cy="50%", r=5))
    return element("svg", element("title", words), shapes, class_="dumbbell", role="img", aria_label=words, tabindex="-1")


def plot(x: Axis, y: Axis, marks: Any, label: str) -> Html:
    """The frame of a chart: grid, ticks, names of the axes, and the marks in it."""
    lines: list[Html] = []
    for value in y.scale.ticks():
        at = f"{100 - y.scale.at(value):.3f}%"
        lines.append(element("line", class_="grid", x1="0", x2="100%", y1=at, y2=at))
        lines.append(element("text", y.text(value), class_="tick", x="0", y=at, dx="-8", dy="4", text_anchor="end"))
    for value in x.scale.ticks():
        at = f"{x.scale.at(value):.3f}%"
        lines.append(element("line", class_="stub", x1=at, x2=at, y1="100%", y2="101.5%"))
        lines.append(element("text", x.text(value), class_="tick", x=at, y="100%", dy="20", text_anchor="middle"))
    return element(
        "div",
        element("p", y.label, class_="axis"),
        element("svg", element("g", lines, aria_hidden="true"), marks, class_="plot", role="group", aria_label=label),
        element("p", x.label, class_="axis end"),
        class_="chart",
    )  # fmt: skip


def curve(points: Sequence[tuple[float, float]], x: Axis, y: Axis, class_: str) -> Html:
    """A line through points; its width stays the same however the figure is stretched."""
    path = " ".join(f"{x.scale.at(a):.3f},{100 - y.scale.at(b):.3f}" for a, b in points)
    line = element("polyline", points=path, class_=class_, vector_effect="non-scaling-stroke")
    return element("svg", line, viewBox="0 0 100 100", preserveAspectRatio="none", width="100%", height="100%",
                   aria_hidden="true", overflow="visible")  # fmt: skip


def dot(point: tuple[float, float], x: Axis, y: Axis, words: str, class_: str) -> Html:
    return mark("circle", words, class_=f"mark {class_}", cx=f"{x.scale.at(point[0]):.3f}%",
                cy=f"{100 - y.scale.at(point[1]):.3f}%", r=4)  # fmt: skip


def colour(index: int) -> str:
    """The classes of the n-th series: eighteen that differ, then again from the start."""
    return f"c{index % COLOURS} d{index // COLOURS % DASHES}"


@dataclass(frozen=True)
class Strip:
    """One row of a strip plot: its values with median and quartiles where they are known."""

    name: str
    class_: str
    samples: Sequence[float]
    median: float | None
    low: float | None
    high: float | None
    words: str


def strips(rows: Sequence[Strip], x: Axis, text: Callable[[Any], str], label: str) -> Html:
    """Every sample a dot, the quartiles a box, the median a line; one row below the other on one scale."""
    height = 58
    shapes: list[Html] = []
    for value in x.scale.ticks():
        at = f"{x.scale.at(value):.3f}%"
        shapes.append(element("line", class_="grid", x1=at, x2=at, y1="0", y2=height * len(rows)))
        shapes.append(element("text", x.text(value), class_="tick", x=at, y=height * len(rows) + 16, text_anchor="middle"))
    for i, row in enumerate(rows):
        shapes += _strip(row, x.scale, height * i, text)
    return element(
        "div",
        element("svg", shapes, class_="strip", height=height * len(rows) + 22, role="group", aria_label=label),
        element("p", x.label, class_="axis end"),
        class_="chart",
    )  # fmt: skip


def _strip(row: Strip, scale: Scale, top: int, text: Callable[[Any], str]) -> list[Html]:
    middle = top + 36
    shapes = [element("text", row.name, class_="name", x="0", y=top + 14)]
    if row.median is not None:
        at = scale.at(row.median)
        shapes.append(element("rect", class_=f"base {row.class_}", x="0", y=middle - 13, width=f"{at:.3f}%", height=26, rx=3))
    if row.low is not None and row.high is not None:
        left, right = scale.at(row.low), scale.at(row.high)
        shapes.append(mark("rect", row.words, class_=f"mark box {row.class_}", x=f"{left:.3f}%", y=middle - 13,
                           width=f"{max(0.2, right - left):.3f}%", height=26, rx=3))  # fmt: skip
    for n, value in enumerate(row.samples):
        shapes.append(mark("circle", f"{row.name}, round {n + 1}: {text(value)}", class_=f"mark dot {row.class_}",
                           cx=f"{scale.at(value):.3f}%", cy=f"{middle + (n * 7 % 11 - 5) * 1.8:.1f}", r=3))  # fmt: skip
    if row.median is not None:
        shapes.append(element("line", class_=f"median {row.class_}", x1=f"{at:.3f}%", x2=f"{at:.3f}%", y1=middle - 16, y2=middle + 16))
    return shapes


def legend(names: Sequence[str], shown: int, target: str) -> Html:
    """Buttons that show and hide series; the first `shown` start pressed."""
    buttons = []
    for i, name in enumerate(names):
        line = element("line", x1="0", x2="100%", y1="50%", y2="50%", class_=f"line {colour(i)}")
        swatch = element("svg", line, class_="swatch", aria_hidden="true")
        pressed = "true" if i < shown else "false"
        buttons.append(element("button", swatch, element("span", name), type="button", aria_pressed=pressed, data_series=i))
    every = [element("button", word, type="button", class_="quiet", data_every=word) for word in ("all", "none")]
    return element("div", join(buttons), element("span", every, class_="every"), class_="legend", role="group", data_for=target,
                   aria_label="Show and hide lines")  # fmt: skip
