"""HTML that cannot be injected into: elements escape every child that is not itself an element."""

from __future__ import annotations

import html
import math
import re
from typing import Any, TypeGuard

from secateur import figures

VOID = {"meta", "input", "br", "rect", "circle", "line", "polyline", "path"}  # written without an end tag, SVG's with a slash
MISSING = "not measured"


class Html(str):
    """Text that is markup already; only `element` and `join` make it."""

    __slots__ = ()


def escape(value: Any) -> Html:
    """Text as it may stand between tags and in quoted attributes. What no document may hold becomes U+FFFD."""
    text = str(value).encode("utf-8", "replace").decode()  # half a surrogate pair cannot be written
    return Html(html.escape(re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", "\ufffd", text)))


def element(name: str, /, *children: Any, **attributes: Any) -> Html:
    """`<name ...>children</name>`. Children that are not Html are escaped, None is left out, lists are flattened.

    An attribute loses a trailing underscore, its other underscores become hyphens; None and False leave it out and True
    writes it bare.
    """
    written = []
    for key, value in attributes.items():
        key = key.rstrip("_").replace("_", "-")
        if value is True:
            written.append(f" {key}")
        elif value is not None and value is not False:
            written.append(f' {key}="{escape(_short(value))}"')
    if name in VOID and not children:
        return Html(f"<{name}{''.join(written)}/>")
    return Html(f"<{name}{''.join(written)}>{join(*children)}</{name}>")


def join(*children: Any) -> Html:
    """Children one after the other, as `element` takes them."""
    parts = []
    for child in children:
        if isinstance(child, (list, tuple)):
            parts.append(join(*child))
        elif child is not None:
            parts.append(child if isinstance(child, Html) else escape(child))
    return Html("".join(parts))


def raw(text: str) -> Html:
    """Text of our own files (the style, the script), which must stand as it is. Never for what a user named."""
    return Html(text)


def _short(value: Any) -> Any:
    return f"{value:.5g}" if isinstance(value, float) else value


# ---------------------------------------------------------------- numbers: each carries its value as the facts have it
def finite(value: Any) -> TypeGuard[float]:
    """Whether there is a number to show."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def number(value: Any, text: str, title: str | None = None) -> Html:
    """`<data>` with the exact value of `report.json` behind what is shown; "not measured" where there is none."""
    if not finite(value):
        return element("span", MISSING, class_="missing")
    return element("data", text, value=repr(value), title=title)


def count_text(value: Any) -> str:
    """1,234 or 1.23 M."""
    if not finite(value):
        return MISSING
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.2f} {letter}"
    return f"{value:,.0f}"


def size_text(value: Any) -> str:
    if not finite(value):
        return MISSING
    for unit, letter in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= unit:
            return f"{value / unit:.2f} {letter}"
    return f"{value:,.0f} B"


def seconds_text(value: Any) -> str:
    if not finite(value):
        return MISSING
    for unit, letter in ((1.0, "s"), (1e-3, "ms")):
        if value >= unit:
            return f"{value / unit:.2f} {letter}"
    return f"{value * 1e6:.1f} µs"


def joules_text(value: Any) -> str:
    return figures.joules(value) if finite(value) else MISSING


def seconds_tick(value: float) -> str:
    """A round number of seconds, as an axis has it."""
    for unit, letter in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if value >= 0.999 * unit:
            return f"{value / unit:.4g} {letter}"
    return "0"


def percent_text(value: Any) -> str:
    if not finite(value):
        return MISSING
    return "100 %" if value == 1 else f"{100 * value:.2f} %"


def error_text(value: Any) -> str:
    return f"{value:.3g}" if finite(value) else MISSING


def count(value: Any) -> Html:
    return number(value, count_text(value), f"{value:,}" if finite(value) and abs(value) >= 1e6 else None)


def size(value: Any) -> Html:
    return number(value, size_text(value), f"{value:,} bytes" if finite(value) else None)


def seconds(value: Any) -> Html:
    return number(value, seconds_text(value))


def joules(value: Any) -> Html:
    return number(value, joules_text(value))


def percent(value: Any) -> Html:
    return number(value, percent_text(value))


def points(value: Any) -> Html:
    return number(value, f"{value:+.2f}".replace("-", "−") if finite(value) else "")


def error(value: Any) -> Html:
    return number(value, error_text(value))


def times(value: Any) -> Html:
    return number(value, f"{value:.2f} ×" if finite(value) else "")
