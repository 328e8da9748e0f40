"""The foot of the page: how to make it again, with what settings, on what machine, and what else is to be known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from secateur.report.html import Html, count, element, finite, join, number, size
from secateur.report.summary import section, table

HOW = {"attributes": "its own class, tensors and attributes resized", "graph": "the captured graph, rewritten"}
MASKED = {**HOW, "attributes": "its own class, weights set to zero"}


def notes(facts: Mapping[str, Any]) -> Html | None:
    held = facts.get("notes")
    return section("notes", "Notes", element("ul", [element("li", note) for note in held])) if held else None


def reproduce(facts: Mapping[str, Any]) -> Html | None:
    command = (facts.get("settings") or {}).get("command")
    if not command:
        return None
    tokens = [join(" " if n else "", element("span", word)) for n, word in enumerate(str(command).split(" "))]
    box = element("pre", element("code", tokens), tabindex="0", id="command", aria_label="Command line")
    copy = element("button", "Copy", type="button", class_="copy", data_copy="command")
    return section("reproduce", "How to make it again", element("div", box, copy, class_="copyable"))


def settings(facts: Mapping[str, Any]) -> Html | None:
    elsewhere = {"command", "targets"} if facts.get("targets") else {"command"}
    rows = [[str(name).replace("_", " "), _value(value)] for name, value in (facts.get("settings") or {}).items() if name not in elsewhere]
    how = MASKED if any(row.get("figure") == "nonzero" for row in facts.get("cost") or ()) else HOW
    rows += [["handed back as", how.get(str(facts["how"]), facts["how"])]] if facts.get("how") else []
    rows += [[f"{name} version", value] for name, value in (facts.get("versions") or {}).items()]
    if facts.get("created"):
        when = str(facts["created"])
        rows.append(["created", element("time", when.replace("T", " ").replace("+00:00", " UTC"), datetime=when)])
    return section("settings", "Settings", table(["", "value"], rows, "Settings", "facts")) if rows else None


def hardware(facts: Mapping[str, Any]) -> Html | None:
    forms = {"memory": size, "cores": count, "threads": count}
    held = (facts.get("hardware") or {}).items()
    rows = [[name, forms[name](value) if name in forms else _value(value)] for name, value in held if value is not None]
    return section("hardware", "Hardware", table(["", "value"], rows, "The machine the numbers are from", "facts")) if rows else None


def _value(value: Any) -> Any:
    """A setting as it reads: lists with commas, true and false as yes and no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if finite(value):
        return number(value, f"{value}")
    if isinstance(value, (list, tuple)):
        return join(*[join(", " if n else "", _value(held)) for n, held in enumerate(value)]) if value else "none"
    if isinstance(value, Mapping):
        return _value([join(key, ": ", _value(held)) for key, held in value.items()])
    return "none" if value is None else value
