"""A console on which numbers are never cut short: tables are fitted to the terminal by folding names, and where that is not enough
every row is written below its name. Where nobody looks at a terminal, in files and pipes, lines are as long as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.measure import Measurement
from rich.table import Column, Table

UNBOUND = 100_000  # characters of a line in a file
NARROWEST = 16  # characters a column of names is folded to at most


class Screen(Console):
    """Standard output, or standard error; texts are written as they are: no markup, no emoji codes."""

    def __init__(self, stderr: bool = False):
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)
        if not self.is_terminal:
            self.width = UNBOUND

    def print(self, *objects: Any, **how: Any) -> None:
        if len(objects) == 1 and isinstance(objects[0], Table):
            self._table(objects[0])
        else:
            super().print(*objects, **how)

    def _table(self, table: Table) -> None:
        """Title and caption are lines of their own, which the width of the table does not fold."""
        title, caption = table.title, table.caption
        table.title = table.caption = None
        for part, style in ((title, "italic"), (self._fitted(table), ""), (caption, "dim")):
            if part is not None:
                super().print(part, style=style)

    def _fitted(self, table: Table) -> Any:
        """The table with widths for its columns such that it fits; one record for every row where it cannot."""
        most = self.options.update(width=UNBOUND)
        over = Measurement.get(self, most, table).maximum - self.width
        for column in table.columns:
            column.overflow = "fold"
        if over <= 0:
            return table
        natural, least = ([width(column) for column in table.columns] for width in (_natural, _least))
        if over > sum(natural) - sum(least):
            return _records(table, self.width)
        headers = [n - max(_cells(column), low) for column, n, low in zip(table.columns, natural, least, strict=True)]
        for column, n, cut in zip(table.columns, natural, _shared(over, headers, natural, least), strict=True):
            column.width = n - cut
        return table


def _lines(value: Any) -> list[str]:
    return str(value).split("\n")


def _cells(column: Column) -> int:
    """The widest of the cells, without the header."""
    return max((cell_len(line) for cell in column.cells for line in _lines(cell)), default=0)


def _natural(column: Column) -> int:
    return max(_cells(column), *(cell_len(line) for line in _lines(column.header)))


def _least(column: Column) -> int:
    """Numbers keep all their digits, and headers their words; names may be folded."""
    words = max((cell_len(word) for word in str(column.header).split()), default=0)
    return max(words, _cells(column)) if column.justify == "right" else max(words, min(_cells(column), NARROWEST))


def _shared(over: int, headers: Sequence[int], natural: Sequence[int], least: Sequence[int]) -> list[int]:
    """What each column gives up of `over` characters: first what only its header needs, then the widest one after the other."""
    cuts = [0] * len(natural)
    for _ in range(over):
        spare = [i for i in range(len(cuts)) if cuts[i] < headers[i]]
        open_ = spare or [i for i in range(len(cuts)) if natural[i] - cuts[i] > least[i]]
        cuts[max(open_, key=lambda i: natural[i] - cuts[i])] += 1
    return cuts


def _records(table: Table, width: int) -> str:
    """Every row as lines of its own: its name, and below it what the columns say."""
    said: list[str] = []
    heads = [" ".join(str(column.header).split()) for column in table.columns]
    for first, *cells in zip(*(column.cells for column in table.columns), strict=True):
        said.append(str(first))
        line = ""
        for head, cell in zip(heads[1:], cells, strict=True):
            if not str(cell):
                continue
            item = f"{head} {cell}".strip()
            if line and cell_len(line) + cell_len(item) + 4 > width:
                said.append(f"  {line},")
                line = ""
            line += f"{', ' if line else ''}{item}"
        said += [f"  {line}"] if line else []
    return "\n".join(said)
