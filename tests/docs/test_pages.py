"""Every page is in the navigation, every link leads somewhere, every name that a page mentions exists."""

import importlib
import os
import re
import subprocess
import sys
from pathlib import PurePosixPath

import pytest

from scripts import docs_pages, readme_table
from secateur import endings
from tests.docs.test_blocks import commands
from tests.docs.written import DOCS, PAGES, ROOT, blocks, everything, in_text, without_blocks

# What looks like a name of ours and is a file or a key
NO_NAMES = {"secateur.json", "secateur.packed"}
TEXTS = {**everything(), "../README.md": (ROOT / "README.md").read_text()}
FOREIGN = {"--nnodes", "--rdzv-endpoint", "--nproc-per-node"}  # torchrun's
LINK = re.compile(r"\]\(([^)\s]+)\)")


def leaves(nav):
    for entry in nav:
        if isinstance(entry, str):
            yield entry
        else:
            for inner in entry.values():
                yield from [inner] if isinstance(inner, str) else leaves(inner)


def test_the_navigation_has_every_page_once():
    yaml = pytest.importorskip("yaml")
    config = docs_pages.on_config(yaml.safe_load((ROOT / "mkdocs.yml").read_text()))
    assert sorted(leaves(config["nav"])) == sorted(everything())


def anchors(text):
    """The places of a page that a link can name: its headings."""
    found = set()
    for heading in re.findall(r"^#+ (.*)$", without_blocks(text), flags=re.M):
        named = re.search(r"\{ *#([\w-]+) *\}", heading)
        plain = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        found.add(named[1] if named else re.sub(r"[-\s]+", "-", plain))
    return found


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_links_lead_somewhere(name):
    for target in LINK.findall(without_blocks(TEXTS[name])):
        if target.startswith(("http://", "https://")):
            continue
        place, _, anchor = target.partition("#")
        there = os.path.normpath(PurePosixPath(name).parent / place) if place else name
        assert there in TEXTS or (DOCS / there).exists(), f"{name}: {target}"
        assert name.startswith("..") or not there.startswith(".."), f"{name}: {target} leads out of the site"
        assert not anchor or anchor in anchors(TEXTS[there]), f"{name}: {target}"


def exists(dotted):
    """Whether a dotted name means something: the longest module it begins with, then attributes."""
    parts = re.sub(r"^sc\b", "secateur", dotted).split(".")
    for n in range(len(parts), 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:n]))
        except ImportError:
            continue
        try:
            for part in parts[n:]:
                thing = getattr(thing, part)
        except AttributeError:
            return False
        return True
    return False


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_names_exist(name):
    code = in_text(TEXTS[name]) + re.findall(r"^```(?:python|diff).*?^```$", TEXTS[name], flags=re.M | re.S)
    found = {dotted for text in code for dotted in re.findall(r"(?<![\w./-])(?:sc|secateur)(?:\.[A-Za-z_]\w*)+", text)}
    unknown = [dotted for dotted in sorted(found - NO_NAMES) if not exists(dotted)]
    assert not unknown, f"{name} names what does not exist: {unknown}"


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_commands_and_options_exist(name):
    known = commands()
    options = {command: {o for p in found.params for o in (*p.opts, *p.secondary_opts)} | {"--help"} for command, found in known.items()}
    anywhere = {"--version", "--install-completion", *FOREIGN}.union(*options.values())
    for code in in_text(TEXTS[name]):
        for option in re.findall(r"^--?[a-z][a-z-]*(?=$|[ =])", code):
            assert option in anywhere or name.startswith("benchmarks/"), f"{name}: `{code}`"
        called = re.match(r"(?:torchrun .*-m )?secateur ([a-z]+)\b", code)
        if called:
            assert called[1] in known, f"{name}: `{code}`"
            # a name of another option, as in `--data text:FILE`, is no option
            for option in re.findall(r"(?<=\s)--?[a-z][a-z-]*", code[called.end() :]):
                assert option in options[called[1]], f"{name}: `{code}`"


@pytest.mark.parametrize("name", sorted(TEXTS))
def test_files_that_are_named_exist(name):
    for code in in_text(TEXTS[name]):
        if re.fullmatch(r"(?:src|tests|benchmarks|scripts|docs|examples)/[\w/.-]+", code):
            assert (ROOT / code).exists(), f"{name} names {code}"


def test_a_card_for_every_criterion_and_method():
    import secateur as sc
    from secateur.masks import METHODS

    text = docs_pages.criteria()
    for each in [*sc.score.CRITERIA.values(), *METHODS.values()]:
        facts = each.facts()
        assert re.search(rf"^### {facts['name']} \{{", text, flags=re.M)
        assert facts["when"] in text and facts["paper"] in text


def test_every_command_and_option_is_in_the_reference():
    text = docs_pages.commands()
    for name, command in commands().items():
        section = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
        for option in [o for p in command.params if not getattr(p, "hidden", False) for o in p.opts if o.startswith("--") and o != "--help"]:
            assert option in section, f"{name} {option}"


def test_every_exit_code_is_said():
    said = (DOCS / "exit-codes.md").read_text()
    codes = re.findall(r"\b(\d+)\b", endings.CODES)
    assert len(codes) >= 6
    assert re.findall(r"^\| (\d+) \|", said, flags=re.M) == sorted(codes, key=int)


def test_benchmarks_are_what_the_files_say():
    text = docs_pages.benchmarks()
    for rows in readme_table.by_source(docs_pages.RESULTS).values():
        for what, figures in rows:
            assert what[1:] in text
            assert all(part in text for part in re.findall(r"\*\*[^*]+\*\*", figures))


def test_python_blocks_name_what_is_public():
    """`sc.x` in a page is a name that docs/names.md lists."""
    import secateur

    for path in PAGES:
        for block in blocks(path):
            used = set(re.findall(r"\bsc\.(\w+)", block.text)) if block.language == "python" else set()
            assert used <= {*secateur.__all__, "models"}, f"{block.page}:{block.line}: {used - set(secateur.__all__)}"


# ---------------------------------------------------------------- the site
@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("material", reason="pip install 'secateur[docs]'")
    out = tmp_path_factory.mktemp("site")
    surroundings = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stderr


def test_the_site_builds_without_a_warning(site):
    out, said = site
    assert "WARNING" not in said and "ERROR" not in said, said
    assert {str(path.relative_to(out).with_suffix(".md")) for path in out.rglob("*.html")} == {*everything(), "404.md"}


def test_the_site_asks_nobody_for_anything(site):
    out, _ = site
    for page in out.rglob("*.html"):
        loads = re.findall(r"<(?:link|script|img|iframe|source)\b[^>]*?(?:href|src)=\"?(https?:)?//[^\">\s]+", page.read_text())
        assert not loads, page.name
    for sheet in out.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", sheet.read_text()), sheet.name


def test_drawings_take_the_colours_of_the_page(site):
    out, _ = site
    assert (out / "concepts.html").read_text().count("<figure class=\"drawing\"") == 2
