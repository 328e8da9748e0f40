"""The page in a real Chromium: it fits, it answers to mouse, finger and keyboard, it asks nobody for anything."""

import io
import json

import pytest
import sheets
from browser import Browser, found

from secateur import report

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(found() is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]
PAGES = {"full": sheets.full, "many": lambda: sheets.full(2000), "attacked": sheets.attacked, "unmeasured": sheets.unmeasured,
         "job": lambda: report.facts(sheets.JOB), "empty": report.facts}  # fmt: skip
TIP = "document.querySelector('#tip').hidden ? '' : document.querySelector('#tip').textContent"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    return {name: report.write(folder / name, make()) for name, make in PAGES.items()}


def rows(browser, table):
    return browser.run(f"[...document.querySelectorAll('{table} tbody tr')].filter(r => r.checkVisibility()).length")


# ---------------------------------------------------------------- what it looks like
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("name", PAGES)
def test_it_fits_and_asks_nobody(name, width, dark, browser, pages):
    browser.open(pages[name], width, 800, dark)
    assert browser.errors == []
    assert [url for url in browser.requests if url != pages[name].as_uri()] == []
    assert browser.run("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    wide = browser.run("""[...document.querySelectorAll('main *, header *')].filter(e => !e.closest('.plot, .strip, caption, thead, .facts thead')
        && e.getBoundingClientRect().right > innerWidth + 0.5).map(e => e.outerHTML.slice(0, 120)).slice(0, 3)""")
    assert wide == []


CONTRAST = """(() => {
  const parse = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = c => { const f = c.slice(0, 3).map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                       return 0.2126 * f[0] + 0.7152 * f[1] + 0.0722 * f[2]; };
  const behind = e => {
    for (; e; e = e.parentElement) { const c = parse(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0.9) return c; }
    return [255, 255, 255];
  };
  const bad = [];
  for (const e of document.querySelectorAll('h1,h2,h3,p,th,td,li,a,button,summary,code,span,data,label,.tick,.name')) {
    if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || !e.getClientRects().length) continue;
    const style = getComputedStyle(e), svg = e instanceof SVGElement;
    const a = light(parse(svg ? style.fill : style.color)), b = light(behind(svg ? e.closest('div') : e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push([e.tagName, e.className.baseVal ?? e.className, e.textContent.slice(0, 30), ratio]);
  }
  return bad.slice(0, 5);
})()"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_has_contrast(dark, browser, pages):
    browser.open(pages["full"], 1280, 900, dark)
    assert browser.run(CONTRAST) == []
    back = browser.run("getComputedStyle(document.body).backgroundColor").removeprefix("rgb(").split(",")
    assert (int(back[0]) < 60) == dark


def test_colours_of_lines_have_contrast_in_both_schemes(browser, pages):
    for dark in (False, True):
        browser.open(pages["full"], 1280, 900, dark)
        strokes = browser.run("[...document.querySelectorAll('#curves .line')].slice(0, 6).map(l => getComputedStyle(l).stroke)")
        assert len(set(strokes)) == 6
        card = browser.run("getComputedStyle(document.querySelector('#sensitivity')).backgroundColor")
        for stroke in strokes:
            a, b = (luminance(colour) for colour in (stroke, card))
            assert (max(a, b) + 0.05) / (min(a, b) + 0.05) >= 3, (stroke, card, dark)


def luminance(colour):
    parts = [int(v) / 255 for v in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    red, green, blue = [v / 12.92 if v <= 0.03928 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_a_picture_is_no_empty_page(browser, pages, tmp_path):
    image = pytest.importorskip("PIL.Image")
    browser.open(pages["full"])
    browser.picture(tmp_path / "page.png")
    held = image.open(io.BytesIO((tmp_path / "page.png").read_bytes())).convert("RGB")
    assert held.width == 1280 and held.height > 3000
    assert len(held.resize((320, held.height // 4)).getcolors(1 << 20)) > 100


def test_it_prints(browser, pages, tmp_path):
    browser.open(pages["full"])
    browser.paper(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    browser.ask("Emulation.setEmulatedMedia", media="print")
    hidden = browser.run("['nav', '.tools', '.copy'].map(s => getComputedStyle(document.querySelector(s)).display)")
    browser.ask("Emulation.setEmulatedMedia", media="")
    assert hidden == ["none"] * 3


# ---------------------------------------------------------------- what it does
def test_pointing_at_a_mark_says_its_values(browser, pages):
    browser.open(pages["full"])
    browser.move(*browser.place("#pareto circle.chosen"))
    assert browser.run(TIP) == "macs=50%: 50.00 %, accuracy 92.64 %"
    browser.move(5, 5)
    assert browser.run(TIP) == ""
    browser.move(*browser.place("#layers .bar"))
    assert "units kept" in browser.run(TIP)
    box = browser.run("(() => { const r = document.querySelector('#tip').getBoundingClientRect(); return [r.left, r.right, r.top] })()")
    assert box[0] >= 0 and box[1] <= 1280 and box[2] >= 0


def test_a_finger_gets_the_values_too(browser, pages):
    browser.open(pages["full"], 360, 780)
    browser.ask("Emulation.setTouchEmulationEnabled", enabled=True)
    browser.tap("#pareto circle.chosen")
    said = browser.run(TIP)
    browser.ask("Emulation.setTouchEmulationEnabled", enabled=False)
    assert said == "macs=50%: 50.00 %, accuracy 92.64 %"
    right = browser.run("document.querySelector('#tip').getBoundingClientRect().right")
    assert right <= 360


def test_the_keyboard_walks_a_chart(browser, pages):
    browser.open(pages["full"])
    stops = browser.run("document.querySelectorAll('#pareto .mark[tabindex=\"0\"]').length")
    assert stops == 1, "one stop of the Tab key per chart"
    browser.run("document.querySelector('#pareto .mark[tabindex=\"0\"]').focus({focusVisible: true})")
    first = browser.run(TIP)
    assert first.startswith("macs=25%")
    browser.key("ArrowRight", 39)
    assert browser.run(TIP).startswith("macs=33%")
    browser.key("ArrowLeft", 37)
    browser.key("ArrowLeft", 37)
    assert browser.run(TIP).startswith("macs=100%"), "it goes round"
    browser.key("Escape", 27)
    assert browser.run(TIP) == ""


def test_the_legend_shows_and_hides_lines(browser, pages):
    browser.open(pages["full"])
    seen = "[...document.querySelectorAll('#curves g[data-series]')].filter(g => getComputedStyle(g).display !== 'none').length"
    assert browser.run(seen) == 8
    browser.click(".legend[data-for=curves] button[data-series='0']")
    assert browser.run(seen) == 7
    assert browser.run("document.querySelector(\".legend[data-for=curves] button[data-series='0']\").getAttribute('aria-pressed')") == "false"
    browser.run("document.querySelector(\".legend[data-for=curves] button[data-series='20']\").focus()")
    browser.key(" ", 32)
    assert browser.run(seen) == 8
    browser.click(".legend[data-for=curves] button[data-every='none']")
    assert browser.run(seen) == 0
    browser.click(".legend[data-for=curves] button[data-every='all']")
    assert browser.run(seen) == 27


@pytest.mark.parametrize("width", [360, 1280])
def test_long_tables_fold_and_filter(width, browser, pages):
    browser.open(pages["many"], width)
    assert rows(browser, "#widths") == 30
    browser.click("#layers input[data-filter]")
    browser.write("layer3.1999 ")
    assert rows(browser, "#widths") == 1
    assert browser.run("document.querySelector('#layers .found').textContent") == "1 of 2000"
    browser.run("(() => { const i = document.querySelector('#layers input'); i.value = ''; i.dispatchEvent(new Event('input')) })()")
    assert rows(browser, "#widths") == 30
    browser.click("#layers button[data-more]")
    assert rows(browser, "#widths") == 2000
    assert browser.run("document.querySelector('#layers button[data-more]').textContent") == "Show fewer"
    browser.click("#layers button[data-more]")
    assert rows(browser, "#widths") == 30


def test_frozen_axes_unfold(browser, pages):
    browser.open(pages["full"])
    assert rows(browser, "#layers details") == 0
    browser.click("#layers summary")
    assert rows(browser, "#layers details") == len(sheets.FROZEN)


def test_the_command_is_copied(browser, pages):
    browser.open(pages["full"])
    browser.run("window.copied = null; navigator.clipboard.writeText = async (text) => { window.copied = text }")
    browser.click("button[data-copy]")
    assert browser.run("window.copied") == sheets.full()["settings"]["command"]
    assert browser.run("document.querySelector('[data-copy]').textContent") == "Copied"


def test_the_facts_are_saved_from_the_page(browser, pages):
    browser.open(pages["full"])
    browser.run("URL.createObjectURL = (blob) => { window.saved = blob.text(); return '#' }")
    browser.click("button[data-save]")
    assert json.loads(browser.run("window.saved")) == report.read(pages["full"].parent)
    assert browser.errors == []


def test_the_navigation_leads_to_its_section(browser, pages):
    browser.open(pages["full"], 360, 780)
    browser.run("document.querySelector('nav a[href=\"#proof\"]').click()")
    top = browser.run("new Promise(done => setTimeout(() => done(document.querySelector('#proof').getBoundingClientRect().top), 300))")
    assert 0 <= top < 120
    browser.run("new Promise(done => setTimeout(done, 200))")
    here = browser.run("(() => { const r = document.querySelector('nav [aria-current]').getBoundingClientRect(); return [r.left, r.right] })()")
    assert here[0] >= 0 and here[1] <= 360, "the section in sight is in sight in the navigation"


def test_without_scripts_everything_can_be_read(browser, pages):
    browser.ask("Emulation.setScriptExecutionDisabled", value=True)
    browser.open(pages["full"])
    shown = rows(browser, "#widths")
    buttons = browser.run("[...document.querySelectorAll('button')].filter(b => b.closest('.legend') === null && b.checkVisibility()).length")
    browser.ask("Emulation.setScriptExecutionDisabled", value=False)
    assert shown == 27 and buttons == 0
