"""Tables that fit the terminal: text bends between words, what matters least is left out and named, nothing is cut below its heading."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table
from rich.text import Text

from .logs import one_line

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult

BEND = frozenset({
    "model", "owner", "user", "state", "pids", "waits for", "why", "because", "how", "note", "notebook", "namespace", "pod", "node",
    "hub", "claim", "kernel", "about",
})  # fmt: skip
"""Columns of words: they may take several lines."""
FROM_THE_LEFT = frozenset({"notebook"})
"""Columns whose end says most: what is too long is cut in front."""
LONGEST_WORD = 20
LEAST_WIDTH = 16
"""A column of words is not made narrower than this, if it has as much to say."""
GAP = 2


class FittingTable:
    """A table that knows what it can do without.

    Parameters
    ----------
    columns : str
        Its headings.
    drop : sequence of str
        Which may be left out where they do not fit, the least useful first.
    """

    def __init__(self, *columns: str, drop: Sequence[str] = ()):
        self.columns = columns
        self.drop = drop
        self.rows: list[list[Text]] = []

    @property
    def row_count(self) -> int:
        """How many rows it has."""
        return len(self.rows)

    def add_row(self, *cells: str | Text) -> None:
        """Add a row, one cell a column."""
        self.rows.append([cell if isinstance(cell, Text) else Text(one_line(cell)) for cell in cells])

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Print what fits, and what does not by name."""
        widths, left_out = self.fit(options.max_width)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        for name, width in widths.items():
            right = name in ("memory", "granted", "used", "peak", "share", "of the share", "refused", "memory limit") or "time" in name
            table.add_column(name, justify="right" if right else "left", width=width, no_wrap=name not in BEND, overflow="ellipsis")
        for row in self.rows:
            cells = dict(zip(self.columns, row, strict=True))
            table.add_row(*(_cut(cells[name], width) if name in FROM_THE_LEFT else cells[name] for name, width in widths.items()))
        yield table
        if left_out:
            yield Text(f"Too narrow for: {', '.join(left_out)}; --json has all.", style="dim")

    def fit(self, width: int) -> tuple[dict[str, int], list[str]]:
        """Return the columns that fit into `width` with the width of each, and which are left out."""
        kept, left_out = list(self.columns), [name for name in self.drop if name in self.columns]
        dropped: list[str] = []
        while True:
            full = {name: self._natural(name) for name in kept}
            least = {name: self._least(name) for name in kept}
            room = width - GAP * len(kept) - 1  # a blank at either edge, two between columns
            if sum(least.values()) <= room or not left_out:
                return _shrunk(full, least, room), dropped
            name = left_out.pop(0)
            kept.remove(name)
            dropped.append(name)

    def _cells(self, name: str) -> list[Text]:
        place = self.columns.index(name)
        return [row[place] for row in self.rows]

    def _natural(self, name: str) -> int:
        return max([len(name), *(cell.cell_len for cell in self._cells(name))])

    def _least(self, name: str) -> int:
        """Return the width down to which a column may bend."""
        if name not in BEND:
            return self._natural(name)
        words = [Text(word).cell_len for cell in self._cells(name) for word in cell.plain.split()]
        lines = min(math.ceil(self._natural(name) / 2), LEAST_WIDTH)
        return max(len(name), min(max(words, default=0), LONGEST_WORD), lines)


def _shrunk(full: dict[str, int], least: dict[str, int], room: int) -> dict[str, int]:
    """Return widths that fit into `room` where that can be: the widest column of words gives first."""
    widths = dict(full)
    while sum(widths.values()) > room:
        able = [name for name in widths if widths[name] > least[name]]
        if not able:
            break
        widths[max(able, key=lambda name: widths[name])] -= 1
    return widths


def _cut(cell: Text, width: int) -> Text:
    """Return a cell with what is too long cut in front."""
    plain = cell.plain
    if cell.cell_len <= width:
        return cell
    while Text(plain).cell_len > width - 1:
        plain = plain[1:]
    return Text("…" + plain)
