"""Every command that is printed is one that the command line takes, and says what was tried."""

import shlex

import pytest
import typer

from secateur import cli
from secateur.advise import Source, candidates
from secateur.advise.candidates import WAYS, careful, careful_ones
from secateur.budget import parse
from secateur.pattern import parse_pattern
from secateur.sparsify import Sparse

SOURCES = [
    Source("my.py:net", "my.py:rows", 512),
    Source("hf/./a folder", "imagefolder:my photos", 64, 7, "weights of mine.safetensors", ("1x3x32x32", "1x4"), ("head", "layer*")),
]


def parsed(line):
    """(command, its options) as the command line reads a line."""
    program, *words = shlex.split(line)
    assert program == "secateur"
    group = typer.main.get_command(cli.app)
    whole = group.make_context("secateur", list(words))
    name, command, rest = group.resolve_command(whole, [*whole._protected_args, *whole.args])
    return name, command.make_context(name, rest, parent=whole).params


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("candidate", [*candidates(), *careful_ones()], ids=lambda c: c.folder)
def test_it_is_taken(candidate, source):
    lines = source.lines(candidate)
    name, said = parsed(lines[-1])
    assert name == candidate.command and said["out"] == candidate.folder and said["rows"] == (source.rows if candidate.quick else None)
    assert said["model"] == (candidate.after.folder if candidate.after else source.model) and said["data"] == source.data
    assert list(said["inputs"] or ()) == list(source.inputs)
    if name != "quantise":
        assert list(said["ignore"] or ()) == list(source.ignore) and said["seed"] == source.seed and said["weights"] == source.weights
    if name == "prune":
        assert [f"macs={t.at_most}" for t in map(parse, said["at_most"])] == [candidate.budget.split(",")[0]]
        assert list(said["only"] or ()) == (["neurons"] if candidate.way == "neurons" else [])
    if name == "mask":
        assert Sparse(said["keep"], said["by"], parse_pattern(said["pattern"])).share() > 0
    if candidate.after:
        assert lines[:-1] == source.lines(candidate.after)


def test_names_and_folders_are_told_apart_and_every_way_comes_early():
    every = candidates()
    assert len({c.name for c in every}) == len({c.folder for c in every}) == len(every)
    assert set(WAYS) == {c.way for c in every[:6]}, "a search that is cut short has seen one of each"
    before = [c.name for c in every]
    assert all(before.index(c.after.name) < before.index(c.name) for c in every if c.after)


def test_what_is_made_with_care_is_the_best_that_loses_little_of_every_way():
    rows = [{"name": c.name, "way": c.way, "state": "measured", "lost": lost, "bytes": size, "ratio": 1.0} for c, lost, size in zip(
        candidates(), [0, 2.7, 5.0, 4.0, 0, 2.7, 0.4, 0.8, 19.0, 9.0, 0, 8.0, 2.0, 0.5, 3.0], [1, 26, 10, 8, 0, 6, 17, 30, 4, 7, 0, 18, 16, 20, 25],
        strict=True)]  # fmt: skip
    rows = [row | {"state": "refused"} if row["way"] == "neurons" else row for row in rows]
    chosen = {c.way: c for c in careful(rows, 1.0)}
    assert {way: c.budget for way, c in chosen.items()} == {
        "structures": "macs=50%, blocks, careful", "patterns": "4x1 keep=50%, careful", "weights": "keep=20%, careful"}
    assert chosen["structures"].options == ("--at-most", "macs=50%", "--depth") and chosen["weights"].options == ("--keep", "20%")
    quick = {"structures": "macs=70%, careful"}
    assert quick.items() <= {c.way: c.budget for c in careful([row | {"ratio": 0.5 if "70" in row["name"] else 1} for row in rows], 1.0)}.items()
    (least,) = careful([rows[2] | {"lost": 60.0}, rows[9] | {"lost": 50.0}], 1.0)
    assert least.budget == "4x1 keep=15%, careful", "where all lose much, what lost least"
