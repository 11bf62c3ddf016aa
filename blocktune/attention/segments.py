"""Which rows of a layout can be attended together."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple

from blocktune.layout import FOREVER, GLOBAL, NO_ROW, Kind, Layout


class Segment(NamedTuple):
    """Rows that attend together, as indices into the flattened ``B * S`` rows, by order.

    Attributes:
        query: The seeing rows.
        key: The rows they may see; the same list in a causal segment.
        causal: Whether each row sees exactly the segment's rows up to itself.
    """

    query: list[int]
    key: list[int]
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
        segments += [_causal(group) for group in groups.values()]
        special = [row for row in spread if row.fresh or row.until != FOREVER]
        start = min((row.order for row in special + sum(groups.values(), [])), default=FOREVER)
        lead = [row for row in spread if row.order < start]
        tail = [row for row in spread if row.order >= start]
        if lead:
            segments.append(_causal(lead))
        if tail:
            keys = [row.index for row in rows if not row.ghost]
            segments.append(Segment([row.index for row in tail], keys, causal=False))
    return segments


class _Row(NamedTuple):
    order: int
    fresh: bool
    index: int
    group: int
    until: int
    ghost: bool


def _rows_by_sample(layout: Layout) -> dict[tuple[int, int], list[_Row]]:
    """The rows of each prompt, in causal order, originals before their fresh rows."""
    fields = ("kind", "sample", "order", "group", "supersedes", "until")
    columns = [getattr(layout, name).flatten().tolist() for name in fields]
    samples = defaultdict(list)
    for index, (kind, sample, order, group, supersedes, until) in enumerate(zip(*columns)):
        if kind != Kind.PAD:
            row = _Row(order, supersedes != NO_ROW, index, group, until, kind == Kind.GHOST)
            samples[index // layout.num_rows, sample].append(row)
    return {sample: sorted(rows) for sample, rows in samples.items()}


def _causal(rows: list[_Row]) -> Segment:
    index = [row.index for row in rows]
    return Segment(index, index, causal=True)
