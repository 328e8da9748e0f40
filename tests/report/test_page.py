"""The page: every number from the facts, nothing injected, nothing loaded, whatever is missing."""

import json
import re

import pytest
import sheets
from pages import Page, numbers, says

from secateur import report
from secateur.figures import plain
from secateur.report import charts, curves

SHEETS = {
    "full": sheets.full, "many": lambda: sheets.full(200), "no groups": lambda: sheets.full(0), "attacked": sheets.attacked,
    "unmeasured": sheets.unmeasured, "empty": report.facts, "job": lambda: report.facts(sheets.JOB),
    "in training": lambda: report.facts(sheets.JOB, training=sheets.training(4)), "begun": lambda: report.facts(training=sheets.training(0)),
}  # fmt: skip


@pytest.fixture(scope="module", params=SHEETS)
def both(request):
    sheet = SHEETS[request.param]()
    return sheet, report.render(sheet)


def test_the_page_is_well_formed(both):
    page = Page(both[1])
    assert not page.faults
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.elements:
        for key in ("aria-labelledby", "aria-controls", "data-for", "data-filter", "data-more", "data-copy"):
            assert attributes.get(key, ids[0]) in ids, f"{key}={attributes[key]} points nowhere"
        if attributes.get("href"):
            assert attributes["href"].removeprefix("#") in ids


def test_every_number_shown_stands_in_the_facts(both):
    sheet, text = both
    known, texts = numbers(plain(sheet))
    held = {repr(number) for number in known}
    page = Page(text)
    for value, shown in page.data:
        assert value in held, f"{shown} ({value}) is not in report.json"
        assert says(shown, float(value)), f"{shown} is not {value}"
    joined = " ".join(texts).replace("\x00", "\ufffd").replace("T", " ").replace("+00:00", " UTC")
    for names, _, words in page.texts:
        if {"svg", "button", "head", "caption"} & set(names):
            continue  # scales of charts, names of series; their numbers are tested through `data` in the tables
        for digits in re.findall(r"\d[\d.,:%-]*", words.replace("float64", "")):
            assert digits.rstrip(".,:-") in joined, f"{digits!r} in {words!r} is not in report.json"


def test_nothing_is_loaded_from_anywhere(both):
    _, text = both
    page = Page(text)
    for name, attributes in page.elements:
        assert name not in ("link", "img", "iframe", "object", "embed", "base", "form", "image", "use")
        assert not {"src", "srcset", "action", "xlink:href", "style"} & attributes.keys()
        assert attributes.get("href", "#").startswith("#")
        assert not [key for key in attributes if key.startswith("on")], "no inline handlers"
    assert not re.search(r"https?://|url\(|@import|\bfetch\(|XMLHttpRequest|WebSocket|\bimport\(", text)
    (rule,) = [a["content"] for n, a in page.elements if a.get("http-equiv") == "Content-Security-Policy"]
    assert rule.startswith("default-src 'none'") and "unsafe" not in rule


def test_strings_of_the_user_are_text(both):
    sheet, text = both
    page = Page(text)
    kinds = [attributes.get("type") for name, attributes in page.elements if name == "script"]
    assert kinds == ["application/json", None], "two scripts: the facts and ours"
    assert "alert(1)" not in "".join(code for attributes, code in page.scripts if not attributes)
    assert text.encode("utf-8")


def test_an_attack_is_shown_as_it_was_written():
    text = report.render(sheets.attacked())
    shown = [words for _, _, words in Page(text).texts]
    assert any(words.startswith(sheets.ATTACK) for words in shown)
    assert "<script>alert" not in text and "</script>\"" not in text
    assert "\x00" not in text and "\ufffd" in text


def test_the_embedded_facts_are_the_facts(both):
    sheet, text = both
    (code,) = [code for attributes, code in Page(text).scripts if attributes.get("type") == "application/json"]
    assert "<" not in code
    assert json.loads(code) == plain(sheet)


def test_a_missing_section_is_not_shown():
    sheet = sheets.full(5)
    parts = {"latency": "latency", "repairs": "repairs", "sensitivity": "sensitivity", "pareto": "pareto", "proof": "proof", "notes": "notes",
             "targets": "targets", "accuracy": "accuracy", "hardware": "hardware"}  # fmt: skip
    for name, key in parts.items():
        less = {k: v for k, v in sheet.items() if k != name}
        assert f'<section id="{key}"' in report.render(sheet)
        assert f'<section id="{key}"' not in report.render(less)
        assert f'href="#{key}"' not in report.render(less)


def test_what_was_not_measured_is_said():
    timed = [{"runtime": "torch", "dense": [], "pruned": []}]
    page = Page(report.render(report.facts(None, accuracy={"dense": 0.9, "cut": float("nan")}, latency=timed)))
    words = [words for _, _, words in page.texts]
    assert words.count("not measured") >= 3
    assert not [word for word in words if re.search(r"\bnan\b|\binf\b|\bNone\b", word)]


@pytest.mark.parametrize("passed, met, word", [(True, True, "proven"), (False, True, "not proven"), (True, False, "target missed")])
def test_the_verdict_does_not_flatter(passed, met, word):
    sheet = sheets.full(3)
    sheet["proof"]["passed"], sheet["targets"][0]["met"] = passed, met
    text = report.render(sheet)
    badge = re.search(r'class="badge (\w+)">.*?</span> ([\w ]+)</span>', text)
    assert badge[2] == word and badge[1] == ("good" if passed and met else "bad")
    assert ("was NOT proven" in text) == (not passed)


def drawn(text, section, shape):
    """Attributes of the shapes of one kind in one section, in order."""
    body = text.partition(f'<section id="{section}"')[2].partition("</section>")[0]
    return [attributes for name, attributes in Page(body).elements if name == shape]


def test_charts_are_drawn_where_the_numbers_are():
    sheet = sheets.full(9)
    text = report.render(sheet)
    points = sorted(sheet["pareto"], key=lambda row: row["share"])
    dots = [(float(d["cx"][:-1]), float(d["cy"][:-1])) for d in drawn(text, "pareto", "circle")]
    assert len(dots) == len(points)
    (line,) = drawn(text, "pareto", "polyline")
    assert [tuple(map(float, p.split(","))) for p in line["points"].split()] == dots, "the line goes through the dots"
    for axis, key, up in ((0, "share", 1), (1, "accuracy", -1)):  # the page's y grows downwards
        a, b, c = [dots[i][axis] for i in (0, 3, 6)], [points[i][key] for i in (0, 3, 6)], up
        assert (a[1] - a[0]) / (a[2] - a[0]) == pytest.approx((b[1] - b[0]) / (b[2] - b[0]), abs=1e-3)
        assert (a[2] - a[0]) * c > 0
    bars = [float(r["width"][:-1]) for r in drawn(text, "layers", "rect")]
    most = max(row["before"] for row in sheet["groups"])
    assert bars == pytest.approx([100 * row[key] / most for row in sheet["groups"] for key in ("before", "after")], abs=1e-3)
    steepest = max(sheet["sensitivity"], key=lambda row: max(p["error"] for p in row["points"]))
    heights = [float(d["cy"][:-1]) for d in drawn(text, "sensitivity", "circle")[:8]]
    errors = [p["error"] for p in steepest["points"]]
    assert heights == sorted(heights) and errors == sorted(errors, reverse=True), "the most sensitive first, more error higher up"
    ends = [float(d["cx"][:-1]) for d in drawn(text, "repairs", "circle")]
    errors = [row[key] for row in sheet["repairs"] for key in ("error_cut", "error_repaired")]
    assert ends == pytest.approx([2 + 96 * e / max(errors) for e in errors], abs=1e-3)


def test_two_thousand_groups_stay_a_page():
    text = report.render(sheets.full(2000))
    assert len(text) < 8_000_000
    assert "Show all 2,000 groups" in text and "Only the most sensitive groups are drawn" in text
    assert text.count("<polyline") <= 130


def test_tables_have_headers_and_charts_have_words(both):
    page = Page(both[1])
    for name, attributes in page.elements:
        if name == "svg" and attributes.get("aria-hidden") != "true":
            assert attributes.get("aria-label"), "a chart without words"
        if name == "th":
            assert attributes["scope"] in ("col", "row")
        if name == "table":
            assert attributes["role"] == "table"
        if "mark" in (attributes.get("class") or "").split():
            assert attributes["tabindex"] == "-1" and attributes["role"] == "img"


def test_a_training_that_is_not_through_shows_how_far_it_is_and_loads_itself_anew():
    for through, done, left in ((0, 0.0, None), (4, 0.4, 61.25 * 6), (10, 1.0, 0.0)):
        sheet = report.facts(training=sheets.training(through))
        assert sheet["training"]["done"] == pytest.approx(done) and sheet["training"]["left"] == (left and pytest.approx(left))
        page = Page(report.render(sheet))
        anew = [a["content"] for name, a in page.elements if name == "meta" and a.get("http-equiv") == "refresh"]
        assert anew == ([] if through == 10 else ["10"])
        points = [a for name, a in page.elements if name == "circle"]
        assert len(points) == 3 * through  # loss, validation loss, accuracy


def test_what_training_changes_is_not_carried_over():
    known = sheets.full()
    kept = report.carried(known)
    assert not kept.keys() & {"accuracy", "latency", "energy", "hardware", "created", "training", "notes"}
    assert all(kept[name] == known[name] for name in ("cost", "groups", "repairs", "proof", "model"))
    assert kept["settings"]["pruned_with"] == known["settings"]["command"] and "command" not in kept["settings"]


def test_what_was_only_inspected_is_not_called_unmeasured():
    cost = [{"figure": "macs", "dense": 1000, "pruned": None}, {"figure": "bytes", "dense": 2048, "pruned": None}]
    groups = [{"name": "a:out", "kind": "channel", "before": 8, "after": 8}]
    text = report.render(report.facts(None, model="net", cost=cost, groups=groups))
    shown = [words for _, _, words in Page(text).texts]
    assert "not measured" not in shown and "pruned" not in shown and not any("lost units" in words for words in shown)
    assert 'class="badge' not in text, "nothing was proven"


def test_a_masked_model_is_not_called_cut():
    masks = [{"layer": "a", "rows": 64, "plain": 0.5, "bias": 0.5, "repaired": 0.1, "used": "fit", "why": ""}]
    why = {**sheets.JOB["why"], "of_parameters": 100, "of_weights": 90, "kept": 30}
    job = {**sheets.JOB, "after": sheets.JOB["before"], "masks": masks, "why": why, "accuracy": {"dense": 0.9, "repaired": 0.8}}
    sheet = report.facts(job)
    text = report.render(sheet)
    assert [row["stage"] for row in sheet["accuracy"]["stages"]] == ["dense", "repaired"], "its statistics alone were not re-estimated"
    assert "its own class, weights set to zero" in text and "tensors and attributes resized" not in text
    tiles = text.partition('<ul class="tiles">')[2].partition("</ul>")[0]
    assert re.findall(r"<h3>(.*?)</h3>", tiles) == ["parameters that are not zeroed", "accuracy"], "what did not change needs no tile"
    assert "fit used" not in text


def test_the_line_of_a_sweep_joins_what_nothing_cheaper_equals():
    points = [(0.25, 0.5), (0.4, 0.7), (0.5, 0.6), (0.6, 0.7), (0.8, 0.71), (0.8, 0.9), (1.0, 0.9)]
    assert curves.unbeaten(points, True) == [(0.25, 0.5), (0.4, 0.7), (0.8, 0.9)]
    assert curves.unbeaten([(1, 3.0), (2, 4.0), (3, 1.0)], False) == [(1, 3.0), (3, 1.0)]
    rows = [{"label": f"p{n}", "share": share, "accuracy": score} for n, (share, score) in enumerate(points)]
    text = report.render(report.facts(None, pareto=rows))
    assert text.count("another point costs less and is as good") == 4 and len(drawn(text, "pareto", "circle")) == 7
    (line,) = drawn(text, "pareto", "polyline")
    assert len(line["points"].split()) == 3


def test_no_scale_goes_beyond_everything_right():
    scale = charts.Scale.over([0.994, 0.994], zero=False, most=1.0)
    assert scale.high == 1.0 and scale.low < 0.994
    assert charts.Scale.over([0.5, 0.7], zero=False, most=1.0).high < 1.0
    assert charts.Scale.over([0.5, 1.2], zero=False, most=1.0).high > 1.2, "a value is never outside"
