"""Any rows over any keys under the rule, a block of rows at a time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from blocktune.attention.kernels import ROW_BLOCK, Knobs, masked_attention
from blocktune.layout import LayerRule, Rows, visible


class Block(NamedTuple):
    """Rows next to each other, the keys that any of them sees, and who sees whom.

    Attributes:
        rows: Of the query rows.
        keys: Of the keys.
        mask: ``(G, 1, rows, keys)``, bool or additive.
    """

    rows: slice
    keys: slice
    mask: Tensor


@dataclass(frozen=True)
class RowBand:
    """Query rows and the keys they may see, both sorted by order.

    Blocks of rows see only the keys up to their last row (and, in a window, from the first one
    that reaches into it), so neither the mask nor the work covers keys that nobody sees.

    Attributes:
        query: Facts of the query rows, ``(G, R)``.
        key: Facts of the keys, ``(G, N)``.
        superseded_until: `Layout.superseded_until` of the keys, ``(G, N)``.
        query_exists: False for padding among the query rows, ``(G, R)``.
        key_exists: False for padding among the keys, ``(G, N)``.
        row_block: Rows of a block: the fewer, the fewer keys after a row it pays for.
    """

    query: Rows
    key: Rows
    superseded_until: Tensor
    query_exists: Tensor
    key_exists: Tensor
    row_block: int = ROW_BLOCK
    _masks: dict = field(default_factory=dict, repr=False)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, knobs: Knobs
    ) -> Tensor:
        """Attends ``query`` ``(G, H, R, D)`` over ``(G, K, N, D)``; returns ``(G, H, R, D)``."""
        # Fused kernels add their mask: made here, all layers keep the same one for backward.
        kind = torch.bool if knobs.softcap is not None else query.dtype
        outs = []
        for rows, keys, mask in self.blocks(rule, kind):
            block = masked_attention(
                query[:, :, rows], key[:, :, keys], value[:, :, keys], mask, knobs
            )
            outs.append(block)
        return torch.cat(outs, dim=2) if len(outs) > 1 else outs[0]

    def blocks(self, rule: LayerRule, kind: torch.dtype) -> list[Block]:
        """Blocks of rows with the keys they may see; made once per rule and kept.

        Args:
            rule: The layer's part of the rule.
            kind: Of the masks: bool, or the dtype of an additive mask.
        """
        if (rule, kind) not in self._masks:
            self._masks[rule, kind] = self._cut(rule, kind)
        return self._masks[rule, kind]

    def pairs(self, window: int | None) -> Tensor | None:
        """Scores that one layer makes for each of ``G``, ``(G,)``; None if none did by blocks."""
        made = (blocks for (rule, _), blocks in self._masks.items() if rule.window == window)
        if (blocks := next(made, None)) is None:
            return None
        spans = (self.query_exists[:, b.rows].sum(1) * (b.keys.stop - b.keys.start) for b in blocks)
        return sum(spans)

    def _cut(self, rule: LayerRule, kind: torch.dtype) -> list[Block]:
        count, step = self.query.kind.shape[1], self.row_block
        blocks = (self._block(slice(a, min(a + step, count)), rule) for a in range(0, count, step))
        return [Block(rows, keys, _as(kind, mask)) for rows, keys, mask in blocks]

    def _block(self, rows: slice, rule: LayerRule) -> Block:
        exists = self.query_exists[:, rows]
        order = self.query.order[:, rows]
        seen = self.key_exists & (self.key.order <= _last(order, exists)[:, None])
        if rule.window is not None:
            seen &= self.key.order > _first(order, exists)[:, None] - rule.window
        columns = seen.any(0).nonzero().squeeze(1)
        keys = slice(int(columns[0]), int(columns[-1]) + 1) if len(columns) else slice(0, 1)
        mask = visible(
            self.query.map(lambda f: f[:, rows, None]),
            self.key.map(lambda f: f[:, None, keys]),
            self.superseded_until[:, None, keys],
            rule,
        )
        mask = mask & exists[:, :, None] & self.key_exists[:, None, keys]
        # Rows that see nothing (padding, ended rows) get one key: a kernel may return NaN for
        # an empty row, and nobody reads theirs.
        mask[..., 0] |= ~mask.any(-1)
        return Block(rows, keys, mask[:, None])


def _as(kind: torch.dtype, mask: Tensor) -> Tensor:
    if kind == torch.bool:
        return mask
    hidden = torch.zeros(mask.shape, dtype=kind, device=mask.device)
    return hidden.masked_fill_(~mask, float("-inf"))


def _last(order: Tensor, exists: Tensor) -> Tensor:
    return order.masked_fill(~exists, torch.iinfo(order.dtype).min).amax(1)


def _first(order: Tensor, exists: Tensor) -> Tensor:
    # Half the range: a window is subtracted from it.
    return order.masked_fill(~exists, torch.iinfo(order.dtype).max // 2).amin(1)
