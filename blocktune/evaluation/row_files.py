"""Rows on disk as soon as they are known, so that a run can stop anywhere and go on."""

from __future__ import annotations

import glob
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from blocktune.evaluation.files import replace_text
from blocktune.evaluation.rows import Row

ROWS = "rows"


class RowFile:
    """The rows of one method, ``LABEL.jsonl``; while a run lasts, a part for each process.

    Opening only reads: rows of another run (other weights, questions, code) are left out, and so
    is a last line that a stopped run left half-written. All processes of a run must have opened
    before one of them appends.

    Args:
        folder: Where it lies.
        label: Of the method.
        keys: `row_key` of every row of this run, in order.
        rank: Number of this process.
    """

    def __init__(self, folder: Path, label: str, keys: Iterable[str], rank: int = 0):
        self.path, self._keys = folder / f"{label}.jsonl", list(keys)
        self._part = _part(self.path, rank)
        self._rows = self._known()
        self._own = self._of(self._part)
        self._begun = False

    @property
    def keys(self) -> Sequence[str]:
        """Of every row of this run, in order."""
        return self._keys

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows to this process's part, on disk before it returns."""
        if not self._begun:  # what an earlier run left there, without its half-written line
            replace_text(self._part, "".join(map(_line, self._own.values())))
            self._begun = True
        new = [row for row in rows if row.key not in self._rows]
        with self._part.open("a", encoding="utf-8") as out:
            out.write("".join(map(_line, new)))
        self._rows |= {row.key: row for row in new}

    def merge(self) -> list[Row]:
        """Joins all parts into one file in the order of the questions, and returns its rows.

        Only one process may call it, when all have ended.

        Raises:
            KeyError: If a question is not answered yet.
        """
        known = self._known()
        rows = [known[key] for key in self._keys]
        replace_text(self.path, "".join(map(_line, rows)))
        for part in _parts(self.path):
            part.unlink()
        return rows

    def _known(self) -> dict[str, Row]:
        found: dict[str, Row] = {}
        for path in (self.path, *_parts(self.path)):
            found |= self._of(path)
        return found

    def _of(self, path: Path) -> dict[str, Row]:
        wanted = set(self._keys)
        return {row.key: row for row in read_rows(path) if row.key in wanted}


def read_all(folder: Path, labels: Sequence[str]) -> dict[str, list[Row]]:
    """The rows of a finished run by label.

    Raises:
        ValueError: If a label has no rows there.
    """
    found = {label: list(read_rows(folder / ROWS / f"{label}.jsonl")) for label in labels}
    if missing := [label for label, rows in found.items() if not rows]:
        raise ValueError(f"no rows of '{missing[0]}' in '{folder / ROWS}'; finish the run first")
    return found


def read_rows(path: Path) -> Iterator[Row]:
    """Rows of a file, up to a line that a stopped run left half-written.

    Raises:
        ValueError: If a whole line is not a row.
    """
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return  # the run was stopped while it wrote this line
        try:
            yield Row(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a row of this version ({error}); move it away"
            ) from None


def _part(path: Path, rank: int) -> Path:
    return path.with_name(f"{path.stem}.part{rank}.jsonl")


def _parts(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{glob.escape(path.stem)}.part*.jsonl"))


def _line(row: Row) -> str:
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"
