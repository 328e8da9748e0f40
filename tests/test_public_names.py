"""The names in ``secateur`` are the names in docs/names.md, and each has a docstring."""

import inspect
import re
from pathlib import Path

import secateur

ROOT = Path(__file__).parent.parent


def documented():
    """The first code word of every row of the table of names."""
    table = (ROOT / "docs" / "names.md").read_text().split("<!-- names -->")[1]
    return re.findall(r"^\| `(\w+)", table, flags=re.MULTILINE)


def test_documented_names_are_the_public_names():
    assert sorted(documented()) == sorted(secateur.__all__)


def test_every_public_name_exists_and_says_what_it_is():
    for name in secateur.__all__:
        thing = getattr(secateur, name)
        assert inspect.ismodule(thing) or not callable(thing) or inspect.getdoc(thing), f"{name} has no docstring"


def test_the_surface_stays_small():
    assert len(secateur.__all__) <= 45


def test_readme_uses_only_public_names():
    used = set(re.findall(r"\bsc\.(\w+)", (ROOT / "README.md").read_text()))
    assert used <= set(secateur.__all__), used - set(secateur.__all__)
