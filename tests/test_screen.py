"""What is printed: no number is ever cut short, whatever the width; files and pipes get whole lines and no control characters."""

import io
import random
import re

import pytest
from rich.cells import cell_len
from rich.table import Table

from secateur.screen import Screen


def screen(width=None):
    """A terminal of that many columns, or a file."""
    made = Screen()
    made.file = io.StringIO()
    if width is not None:
        made._force_terminal, made.no_color, made.width = True, True, width
    return made


def table(rng, names=1, numbers=4, rows=5):
    def name():
        return ".".join(rng.choice(("layer", "feature_extractor", "0", "attention[1]", "conv", ":x:")) for _ in range(rng.randint(1, 6)))

    made = Table("layer", *[f"kind {n}" for n in range(names - 1)], title="a title of some words", title_justify="left", caption="a caption")
    for n in range(numbers):
        made.add_column(rng.choice(("MACs", f"MACs at 50 % (batch of {n})", "parameters saved")), justify="right")
    cells = [[name() for _ in range(names)] + [f"{rng.randint(0, 10**rng.randint(1, 20)):,}" for _ in range(numbers)] for _ in range(rows)]
    for row in cells:
        made.add_row(*row)
    return made, cells


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


@pytest.mark.parametrize("seed", range(40))
def test_no_number_is_cut_short_and_no_line_is_too_long(seed):
    rng = random.Random(seed)
    width = rng.randint(50, 130)
    made, cells = table(rng, rng.randint(1, 3), rng.randint(0, 7))
    console = screen(width)
    console.print(made)
    said = plain(console.file.getvalue())
    assert max(map(cell_len, said.splitlines())) <= width
    assert "…" not in said
    shown = re.findall(r"\d[\d,]*", said)
    for row in cells:
        for number in (cell for cell in row if re.fullmatch(r"[\d,]+", cell)):
            assert number in [one.rstrip(",") for one in shown], f"{number} at {width} columns in\n{said}"
    letters = re.sub(r"[\s│┃━─┼╇┏┳┓┡┩└┴┘,]", "", said)
    if "│" not in said:  # one record for each row, names whole
        assert all(row[0] in said or cell_len(row[0]) > width for row in cells) and "atitleofsomewords" in letters


@pytest.mark.parametrize("seed", range(10))
def test_a_file_gets_every_row_on_one_line(seed):
    made, cells = table(random.Random(seed), 2, 6)
    console = screen()
    console.print(made)
    console.print("word " * 100)
    said = console.file.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", said), "no control characters but the ends of lines"
    for row in cells:
        (line,) = [line for line in said.splitlines() if all(f" {cell} " in line for cell in row)]
        assert line
    assert "word " * 99 in said


def test_names_are_written_as_they_are():
    for console in (screen(), screen(60)):
        made = Table("name", title="[bold]out[1]")
        made.add_row("[red]layer[0] :smile:")
        console.print(made)
        console.print("[red]x[/red] :smile:")
        assert plain(console.file.getvalue()).count(":smile:") == 2
        assert "[red]layer[0] :smile:" in console.file.getvalue() and "[red]x[/red]" in console.file.getvalue()


def test_a_header_is_folded_before_a_name():
    made = Table("layer")
    made.add_column("a header of many words", justify="right")
    made.add_row("feature_extractor.0.conv", "1,234")
    console = screen(45)
    console.print(made)
    said = plain(console.file.getvalue())
    assert "feature_extractor.0.conv" in said and "a header of many words" not in said
