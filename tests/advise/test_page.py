"""The picture and the table of an advice: every measured point twice, what is beaten grey, the line where nothing is better."""

import re

import pytest

from secateur import report
from secateur.advise.verdict import marked, points, verdict
from secateur.errors import FormatError


def row(name, way, lost, ratio, size, **rest):
    return {"name": name, "way": way, "lost": lost, "interval": 0.4, "ratio": ratio, "spread": 0.02, "seconds": ratio / 500, "bytes": size,
            "peak_bytes": None, "took": 30.0, "runtime": "torch", "commands": [f"secateur x '{name}' <&>"], "state": "measured", **rest}  # fmt: skip


def advised():
    dense = {**row("dense", "dense", 0.0, 1.0, 4_000_000), "took": None}
    rows = [row("structures <b>half</b>", "structures", 0.9, 0.6, 2_000_000), row("weights keep=5%", "weights", 60.0, 1.0, 300_000),
            row("patterns 2:4", "patterns", 1.0, 1.0, 2_100_000),
            {"name": "int8", "way": "int8", "state": "refused", "why": "no <package>", "commands": []}]  # fmt: skip
    rows = [{"budget": "", **r} for r in rows]
    marked(dense, rows)
    return {"metric": "accuracy", "held_out": 2000, "dense": dense, "rows": rows, "verdict": verdict(dense, rows, "accuracy", 1.0)}


def section(facts):
    page = report.render(report.facts(None, model="net", advice=facts))
    return page[page.index('<section id="advice"') : page.index("</section>")], page


def test_every_point_stands_in_both_pictures_and_what_is_beaten_is_grey():
    facts = advised()
    text, _ = section(facts)
    dots = [d for d in re.findall(r"<circle[^>]*>", text) if 'role="img"' in d]
    known = [facts["dense"], *facts["rows"][:3]]
    assert len(dots) == 2 * len(known)
    assert sum("beaten" in d for d in dots) == 2 * sum(not r["front"] for r in known) == 2
    assert sum("chosen" in d for d in dots) == 2 * sum(r["front"] for r in known) == 6


def test_an_interval_that_is_not_known_is_said():
    """Of one row held out."""
    facts = advised()
    facts["rows"][0]["interval"] = None
    assert "0.90 ± unknown" in section(facts)[0] and points(facts["rows"][0]) == "0.90 ± unknown"
    assert points({"lost": 1.0, "interval": float("inf")}) == "1.00 ± unknown"


def test_the_line_only_ever_falls():
    text, _ = section(advised())
    for line in re.findall(r'<polyline points="([^"]*)" class="line front"', text):
        at = [tuple(map(float, p.split(","))) for p in line.split()]
        assert len(at) >= 2 and all(a[0] < b[0] and a[1] < b[1] for a, b in zip(at, at[1:], strict=False)), "in SVG down is more: fewer points lost"


def test_names_reasons_and_commands_are_text():
    text, page = section(advised())
    assert "structures &lt;b&gt;half&lt;/b&gt;" in text and "<b>half" not in page
    assert "refused: no &lt;package&gt;" in text and "&lt;&amp;&gt;" in text
    assert advised()["verdict"][-1].split(":")[0] in page.split("<main>")[0], "the verdict stands at the top"


def test_without_it_there_is_no_section_and_without_its_form_it_is_refused():
    assert 'id="advice"' not in report.render(report.facts(None, model="net", notes=["a"]))
    with pytest.raises(FormatError, match="section 'advice'"):
        report.render({**report.facts(None, model="net"), "advice": {"rows": []}})
