"""`secateur explain`: what is said about every criterion is complete, and the same in both forms."""

import json

import pytest

from secateur import cli
from secateur.score import CRITERIA


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_says_all_there_is_to_say(name, capsys):
    assert cli.main(["explain", name, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == ["name", "formula", "needs", "cost", "when", "paper"]
    assert all(facts.values()) and facts["name"] == name
    assert any(str(year) in facts["paper"] for year in range(1990, 2027)), "a paper has a year"
    assert CRITERIA[name].function.__doc__
    assert cli.main(["explain", name]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert all(" ".join(facts[key].split()) in printed for key in ("formula", "cost", "when"))


def test_without_a_name_there_is_a_table_of_all(capsys):
    assert cli.main(["explain"]) == 0
    printed = capsys.readouterr().out
    assert all(f"│ {name} " in printed for name in CRITERIA)
    assert cli.main(["explain", "--json"]) == 0
    assert [row["name"] for row in json.loads(capsys.readouterr().out)["criteria"]] == list(CRITERIA)


def test_an_unknown_name_is_refused_with_the_list(capsys):
    assert cli.main(["explain", "magic"]) == 2
    message = capsys.readouterr().err
    assert "'magic'" in message and "taylor_squared" in message
