"""Formats numbers and tables for terminal, Markdown and HTML."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table as RichTable

ABSENT = "-"
WORDS = 18  # smallest width to which a column of words is folded
FORMS: dict[str, Callable[[float], str]] = {  # formats of numbers, by the kind of quantity
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


def written(form: str, value: float | None) -> str:
    """Formats a number by a name in `FORMS`; None becomes a dash."""
    return ABSENT if value is None else FORMS[form](value)


def with_interval(form: str, mean: float | None, ends: Sequence[float] | None) -> str:
    """A number with its confidence interval: ``12.5 (2.5 to 22.5)``."""
    if mean is None or ends is None:
        return written(form, mean)
    low, high = (written(form, end) for end in ends)
    return f"{written(form, mean)} ({low} to {high})"


def with_half(mean: float, ends: Sequence[float], digits: int = 0) -> str:
    """A score in % with half the width of its confidence interval: ``97.0 ±4``."""
    low, high = ends
    return f"{written('score', mean)} ±{50 * (high - low):.{digits}f}"


class Table(NamedTuple):
    """A table: headings, and rows whose first cell is the row's name."""

    headings: Sequence[str]  # a line break narrows the column in the terminal
    rows: Sequence[Sequence[str]]  # text of the cells
    title: str = ""  # above the table in the terminal
    note: str = ""  # below the table
    left: Sequence[str] = ()  # headings of columns with words, which may be folded

    def markdown(self, *, right: bool = False) -> str:
        """The table as Markdown. If ``right``, all columns but the first are right-aligned."""
        headings = [name.replace("-\n", "-").replace("\n", " ") for name in self.headings]
        escaped = ([cell.replace("|", "\\|") for cell in row] for row in (headings, *self.rows))
        lines = [f"| {' | '.join(row)} |" for row in escaped]
        lines.insert(1, "|---" + ("|---:" if right else "|---") * (len(self.headings) - 1) + "|")
        return "\n".join(lines)

    def show(self, console: Console | None = None) -> None:
        """Prints the table. Columns that do not fit follow in further tables below."""
        from rich.console import Console

        console = console or Console()
        for block in self._blocks(console):
            console.print(block, "")
        if self.note:
            console.print(self.note, style="dim", markup=False, highlight=False)

    def _blocks(self, console: Console) -> list[RichTable]:
        """Splits the columns into tables that fit the console, each with the first column."""
        columns = range(len(self.headings))
        needed, least = map(list, zip(*map(self._widths, columns), strict=True))
        needed[0] = least[0] = min(needed[0], console.width // 2)  # longer names are folded
        blocks, start = [], 1
        while start < len(self.headings):
            for stop in range(len(self.headings), start, -1):
                widths = {index: needed[index] for index in (0, *columns[start:stop])}
                while sum(widths.values()) + 2 * len(widths) - 2 > console.width:
                    wide = max(widths, key=lambda index: widths[index] - least[index])
                    if widths[wide] <= least[wide]:
                        break
                    widths[wide] -= 1
                else:
                    break
            blocks.append(self._rich(widths, first=not blocks))
            start = stop
        return blocks

    def _widths(self, index: int) -> tuple[int, int]:
        """Number of characters that a column needs, and the smallest that it can be folded to."""
        cells = [self.headings[index], *(row[index] for row in self.rows)]
        lines = [line for cell in cells for line in cell.split("\n")]
        needed = max(map(len, lines))
        if index == 0 or self.headings[index] not in self.left:
            return needed, needed
        words = (len(word) for line in lines for word in line.split())
        return needed, max([min(WORDS, needed), *words])

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
                Text(name),  # not a string: brackets in names would be read as markup
                justify="left" if left else "right",
                vertical="top" if self.left else "bottom",
                width=width,
                overflow="fold",
            )
        for row in self.rows:
            table.add_row(*(Text(row[index]) for index in widths))
        return table
