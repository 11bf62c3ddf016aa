"""Which rows of a layout can be attended together."""

from __future__ import annotations

from collections import defaultdict
from itertools import pairwise
from typing import NamedTuple

from blocktune.layout import FOREVER, GLOBAL, NO_ROW, Kind, Layout


class Segment(NamedTuple):
    """Rows that attend together, as indices into the flattened ``B * S`` rows, by order.

    Attributes:
        query: The seeing rows.
        key: The rows they may see.
        own: Whether the keys are the query rows themselves.
        causal: Whether each row sees exactly the segment's rows up to itself.
    """

    query: list[int]
    key: list[int]
    own: bool
    causal: bool


def find_segments(layout: Layout) -> list[Segment]:
    """Splits the rows into causal segments and global rows over everything.

    Each group (a chunk with its ghosts) is causal. So are the global rows that come before any
    chunk: the prefix, or a whole prompt in full attention. The remaining global rows of a
    prompt see whatever the rule shows them among all its rows that are not ghosts.

    Args:
        layout: Rows ``(B, S)`` on the CPU.

    Returns:
        Segments that hold every row but the padding exactly once as a query.
    """
    segments = []
    for rows in _rows_by_sample(layout).values():
        groups = defaultdict(list)
        for row in rows:
            groups[row.group].append(row)
        spread = groups.pop(GLOBAL, [])
        segments += [_own(group) for group in groups.values()]
        start = min((row.order for row in rows if row.special or row.group != GLOBAL), default=None)
        lead = [row for row in spread if start is None or row.order < start]
        tail = spread[len(lead) :]
        if lead:
            segments.append(_own(lead))
        if tail:
            keys = _index([row for row in rows if not row.ghost])
            segments.append(Segment(_index(tail), keys or _index(tail), own=False, causal=False))
    return segments


class _Row(NamedTuple):
    order: int
    fresh: bool
    index: int
    group: int
    ends: bool
    ghost: bool

    @property
    def special(self) -> bool:
        """Whether global rows after this one may not see it in every layer."""
        return self.fresh or self.ends or self.ghost


def _rows_by_sample(layout: Layout) -> dict[tuple[int, int], list[_Row]]:
    """The rows of each prompt, in causal order, originals before their fresh rows."""
    fields = ("kind", "sample", "order", "group", "supersedes", "until")
    columns = [getattr(layout, name).flatten().tolist() for name in fields]
    samples = defaultdict(list)
    rows = enumerate(zip(*columns, strict=True))
    for index, (kind, sample, order, group, supersedes, until) in rows:
        if kind != Kind.PAD:
            fresh, ends, ghost = supersedes != NO_ROW, until != FOREVER, kind == Kind.GHOST
            row = _Row(order, fresh, index, group, ends, ghost)
            samples[index // layout.num_rows, sample].append(row)
    return {sample: sorted(rows) for sample, rows in samples.items()}


def _own(rows: list[_Row]) -> Segment:
    """Rows that see none but themselves; causal unless some end early or share an order."""
    in_order = all(a.order < b.order for a, b in pairwise(rows))
    causal = in_order and not any(row.ends for row in rows)
    return Segment(_index(rows), _index(rows), own=True, causal=causal)


def _index(rows: list[_Row]) -> list[int]:
    return [row.index for row in rows]
