"""The mutants still fit the source; whether they are noticed is what `make bite` finds out."""

from pathlib import Path

import pytest

from tests.bite.mutants import MUTANTS

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_mutant_still_fits(mutant):
    assert (ROOT / "src" / mutant.file).read_text().count(mutant.old) == 1
    assert mutant.new != mutant.old
    for test in mutant.tests:
        file, _, name = test.partition("::")
        assert (ROOT / file).exists(), file
        assert name.split("[")[0] in (ROOT / file).read_text()


def test_names_are_different():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
