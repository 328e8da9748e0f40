"""Reports of real runs in a real Chromium: nothing in the console, nothing wider than a phone; and the pictures that the docs show.

    SECATEUR_PICTURES=1 python -m pytest tests/report/test_pictures.py      # writes docs/img/report-*.png anew
"""

import os
from pathlib import Path

import pytest
from browser import Browser, found

from secateur import demo, explore, job
from secateur.budget import parse_points
from secateur.models import LoadedModel, load_data
from secateur.models.digits import trained_digits_net

IMAGES = Path(__file__).parent.parent.parent / "docs" / "img"
WRITE = bool(os.environ.get("SECATEUR_PICTURES"))
SHAPES = {"desktop": (1280, 900, False), "dark": (1280, 900, True), "phone": (390, 844, False), "phone-dark": (390, 844, True)}
SHOWN = {  # picture: report, shape, the section at the top of the window
    "report-desktop": ("demo", "desktop", None), "report-dark": ("demo", "dark", "#layers"), "report-phone": ("demo", "phone", None),
    "report-sweep": ("sweep", "desktop", None),
}  # fmt: skip
MOST = 150_000  # bytes of a picture

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(found() is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """`secateur demo -o`, and a sweep of the network that it trains."""
    pytest.importorskip("sklearn")
    folder = tmp_path_factory.mktemp("runs")
    demo.run(folder / "demo", quiet=True)
    data = load_data("digits")
    loaded = LoadedModel(trained_digits_net(data), data.example(1)[0], "digits_net")
    points = parse_points(["macs=80%,60%,40%,25%"])
    around = explore.Around(data, folder / "sweep", latency=True, command="secateur sweep net.py:net --at-most macs=80%,60%,40%,25% --data digits")
    explore.run(loaded, job.example_inputs(loaded, data, ()), points, job.Options(), around)
    return {name: folder / name / "report.html" for name in ("demo", "sweep")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["demo", "sweep"])
def test_a_real_report_fits_and_its_console_is_empty(name, shape, reports, browser):
    width, height, dark = SHAPES[shape]
    browser.open(reports[name], width, height, dark)
    assert browser.errors == []
    assert browser.requests == [reports[name].as_uri()]
    assert browser.run("document.documentElement.scrollWidth") <= width, "the page scrolls sideways"
    cut = browser.run("""[...document.querySelectorAll('h1, h2, p, th, td, li, data')].filter(e => e.checkVisibility()
        && !e.closest('caption, nav') && e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).display !== 'inline'
        && getComputedStyle(e.closest('thead') ?? e).position !== 'absolute').map(e => e.outerHTML.slice(0, 120)).slice(0, 3)""")
    assert cut == [], "text that is wider than its box"


@pytest.mark.parametrize("picture", SHOWN)
def test_pictures_of_the_docs(picture, reports, browser, tmp_path):
    """Small enough to be kept, and of the page as a person sees it first or after a click on a section."""
    image = pytest.importorskip("PIL.Image")
    name, shape, section = SHOWN[picture]
    browser.open(reports[name], *SHAPES[shape])
    if section:
        browser.run(f"document.querySelector('nav a[href=\"{section}\"]').click()")
        browser.run("new Promise(done => setTimeout(done, 400))")
    path = (IMAGES if WRITE else tmp_path) / f"{picture}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    browser.picture(path, whole=False)
    held = image.open(path).convert("RGB").quantize(200, method=image.Quantize.MEDIANCUT, dither=image.Dither.NONE)
    held.save(path, optimize=True)
    assert held.size == SHAPES[shape][:2]
    assert len(held.convert("RGB").getcolors(1 << 20)) > 30, "an empty page"
    assert path.stat().st_size <= MOST
    kept = IMAGES / f"{picture}.png"
    assert kept.is_file() and kept.stat().st_size <= MOST, "run it with SECATEUR_PICTURES=1, and commit docs/img"
