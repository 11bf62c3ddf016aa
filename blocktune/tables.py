"""Numbers and tables, written one way for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

ABSENT = "-"
WORDS = 18
"""Narrowest width to which a column of words is folded."""
FORMS: dict[str, Callable[[float], str]] = {
    "score": lambda value: f"{100 * value:.1f}",
    "points": lambda value: f"{100 * value:+.1f}",
    "share": lambda value: f"{100 * value:.0f} %",
    # of a gap: below that, a loss over a small gap, how many times the gap it is says nothing
    "gap": lambda value: "< -100 %" if value < -1 else f"{100 * value:.0f} %",
    "ms": lambda value: f"{1000 * value:.1f}",
    "ratio": lambda value: f"{value:.2f}x",
    "p": lambda value: f"{value:.2g}",
    "count": lambda value: f"{value:,.0f}",
    "nats": lambda value: f"{value:.3g}",
    "bytes": lambda value: (
        f"{value / 2**20:.0f} MiB" if value < 2**30 else f"{value / 2**30:.1f} GiB"
    ),
}
"""How a number is written, by the kind of number it is."""


def written(form: str, value: float | None) -> str:
    """A number as text, in a form of `FORMS`; a dash for None."""
    return ABSENT if value is None else FORMS[form](value)


def with_interval(form: str, mean: float | None, ends: Sequence[float] | None) -> str:
    """A number with its interval in brackets: ``12.5 (2.5 to 22.5)``."""
    if mean is None or ends is None:
        return written(form, mean)
    low, high = (written(form, end) for end in ends)
    return f"{written(form, mean)} ({low} to {high})"


def with_half(mean: float, ends: Sequence[float], digits: int = 0) -> str:
    """A score in % with half the width of its interval: ``97.0 ±4``."""
    low, high = ends
    return f"{written('score', mean)} ±{50 * (high - low):.{digits}f}"


class Table(NamedTuple):
    """Headings and rows of cells; the first cell of a row names it."""

    headings: Sequence[str]  # a line break shortens a column in the terminal
    rows: Sequence[Sequence[str]]  # the cells' text
    title: str = ""  # above it in the terminal
    note: str = ""  # below it
    left: Sequence[str] = ()  # columns of words, which may take several lines; others are numbers

    def markdown(self, *, right: bool = False) -> str:
        """The table as Markdown; columns but the first are set right if ``right``."""
        rows = [self._words(), *self.rows]
        lines = [f"| {' | '.join(row)} |" for row in rows]
        lines.insert(1, "|---" + ("|---:" if right else "|---") * (len(self.headings) - 1) + "|")
        return "\n".join(lines)

    def show(self, console: Console | None = None) -> None:
        """Prints it; columns that do not fit beside the others follow below, none is cut."""
        from rich.console import Console

        console = console or Console()
        for block in self._blocks(console):
            console.print(block, "")
        if self.note:
            console.print(self.note, style="dim", markup=False, highlight=False)

    def _blocks(self, console: Console) -> list[RichTable]:
        """Tables of as many columns as the console has room for, each with the first column."""
        blocks, start = [], 1
        while start < len(self.headings):
            for stop in range(len(self.headings), start, -1):
                widths = self._widths([0, *range(start, stop)])
                while sum(widths.values()) + 2 * len(widths) - 2 > console.width:
                    wide = max(widths, key=lambda index: widths[index] - self._least(index))
                    if widths[wide] <= self._least(wide):
                        break
                    widths[wide] -= 1
                else:
                    break
            blocks.append(self._rich(widths, first=not blocks))
            start = stop
        return blocks

    def _widths(self, columns: Sequence[int]) -> dict[int, int]:
        """Characters that each column needs."""
        return {index: max(map(len, self._lines(index))) for index in columns}

    def _least(self, index: int) -> int:
        """Characters that a column can be folded to."""
        lines = self._lines(index)
        natural = max(map(len, lines))
        if index == 0 or self.headings[index] not in self.left:
            return natural
        return max(min(WORDS, natural), *(len(word) for line in lines for word in line.split()))

    def _lines(self, index: int) -> list[str]:
        cells = [self.headings[index], *(row[index] for row in self.rows)]
        return [line for cell in cells for line in cell.split("\n")]

    def _rich(self, widths: Mapping[int, int], *, first: bool) -> RichTable:
        from rich import box
        from rich.markup import escape
        from rich.table import Table as RichTable
        from rich.text import Text

        table = RichTable(
            title=escape(self.title) if first and self.title else None,
            title_justify="left",
            box=box.SIMPLE_HEAD,
            pad_edge=False,
            show_edge=False,
            padding=(0, 0, 0, 1),
        )
        for index, width in widths.items():
            name = self.headings[index]
            left = index == 0 or name in self.left
            table.add_column(
                Text(name),  # as all that is shown: names may hold brackets
                justify="left" if left else "right",
                vertical="top" if self.left else "bottom",
                width=width,
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*(Text(row[index]) for index in widths))
        return table

    def _words(self) -> list[str]:
        """Headings in one line each."""
        return [name.replace("-\n", "-").replace("\n", " ") for name in self.headings]
