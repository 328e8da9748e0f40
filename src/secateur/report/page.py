"""The page: sections in their order, with style, script and facts in one file that asks nobody for anything."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from secateur.errors import FormatError
from secateur.report import about, advice, curves, layers, summary, training
from secateur.report.facts import FORMAT, plain
from secateur.report.html import Html, element, join, raw

SECTIONS = (
    ("Advice", "advice", advice.advice),
    ("Cost", "cost", summary.costs), ("Targets", "targets", summary.targets), ("Accuracy", "accuracy", summary.accuracy),
    ("Training", "training", training.training),
    ("Latency", "latency", curves.latency), ("Widths", "layers", layers.widths), ("Repair", "repairs", layers.repairs),
    ("Sensitivity", "sensitivity", curves.sensitivity), ("Pareto", "pareto", curves.pareto), ("Proof", "proof", summary.proof),
    ("Notes", "notes", about.notes), ("Again", "reproduce", about.reproduce), ("Settings", "settings", about.settings),
    ("Hardware", "hardware", about.hardware),
)  # fmt: skip


ANEW = 10  # seconds after which the page of a training that is not through loads itself anew


def render(facts: Mapping[str, Any]) -> str:
    """The HTML document for a report's facts (see `report.facts`). Sections that are absent are not shown.

    Raises FormatError where the facts are not those of a report, or a section does not have its form.
    """
    if not isinstance(facts, Mapping) or facts.get("format") != FORMAT:
        said = facts.get("format") if isinstance(facts, Mapping) else type(facts).__name__
        raise FormatError(f"a report has format {said!r}, this version of secateur shows {FORMAT!r}.\n  Pass what report.facts() returned.")
    facts = plain(facts)
    shown = []
    for title, key, make in SECTIONS:
        try:
            body = make(facts)
        except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
            raise FormatError(
                f"section {key!r} of the report has not its form: {type(error).__name__}: {error}.\n  The schema stands in secateur.report.facts."
            ) from error
        if body is not None:
            shown.append((title, key, body))
    try:
        top = summary.header(facts)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise FormatError(f"the report has not its form: {type(error).__name__}: {error}.\n  The schema stands in secateur.report.facts.") from error
    links = [element("li", element("a", title, href=f"#{key}")) for title, key, _ in shown]
    nav = element("nav", element("ul", links), aria_label="Sections") if len(links) > 1 else None
    body = join(top, "\n", nav, "\n", element("main", [join(part, "\n") for _, _, part in shown]), "\n", _foot())
    return "<!doctype html>\n" + element("html", _head(facts), "\n", _body(body, facts), lang="en") + "\n"


def _head(facts: Mapping[str, Any]) -> Html:
    style, script = _own("page.css"), _own("page.js")
    rule = f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; base-uri 'none'; form-action 'none'"
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=rule),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", http_equiv="refresh", content=str(ANEW)) if training.running(facts) else None,
        element("title", f"{facts.get('model') or 'Pruned model'} · secateur report"),
        element("style", raw(style)),
    )  # fmt: skip


def _body(content: Html, facts: Mapping[str, Any]) -> Html:
    data = element("script", embedded(facts), type="application/json", id="facts")
    tip = element("div", "", id="tip", role="tooltip", hidden=True)
    return element("body", element("div", content, class_="page"), "\n", tip, data, element("script", raw(_own("page.js"))))


def _foot() -> Html:
    save = element("button", "Save report.json", type="button", class_="quiet", data_save="facts")
    return element("footer", element("p", "Every number on this page stands in report.json. Made by secateur. ", save))


def embedded(facts: Mapping[str, Any]) -> Html:
    """JSON that cannot end the script element it stands in, nor open a comment: <, > and & are written as \\u escapes."""
    text = json.dumps(facts, allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return raw(text)


@cache
def _own(name: str) -> str:
    return "\n" + files("secateur.report").joinpath(name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
