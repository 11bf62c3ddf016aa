"""Scores of a few rows at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from blocktune.attention.kernels import Knobs, plain_scores
from blocktune.attention.rows import Block
from blocktune.reshape.base import Seen

CELLS = 1 << 25
"""Scores that are in memory at once, unless a single row has more."""


class States(NamedTuple):
    """What a layer attends with; keys and values are float32."""

    query: Tensor
    key: Tensor
    value: Tensor
    knobs: Knobs

    def scores(self, block: Block, seen: Seen) -> tuple[Tensor, Seen]:
        """Scores of a block, ``(B, H, R, N)``, and what the reshape is told about them."""
        rows, keys, mask = block
        query, key = self.query[:, :, rows], self.key[:, :, keys]
        part = seen._replace(
            query=seen.query.map(lambda field: field[:, rows]),
            key=seen.key.map(lambda field: field[:, keys]),
            reused=seen.reused[:, keys],
        )
        return plain_scores(query, key, mask, self.knobs), part


def cut(block: Block, heads: int) -> Iterator[Block]:
    """Parts of a block whose scores, times ``heads``, stay within `CELLS`."""
    rows, keys, mask = block
    step = max(1, CELLS // (heads * mask.shape[-1]))
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        inside = slice(start - rows.start, stop - rows.start)
        yield Block(slice(start, stop), keys, mask[:, :, inside])
