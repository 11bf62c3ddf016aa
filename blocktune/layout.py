"""The rows of a forward pass, and the rule that decides which rows each one may see.

All masks, in training, caching and serving, are made by it. A forward pass has one *row* for each
token that is computed. A recomputed token has two: the original, which its own chunk saw, and the
fresh one, which supersedes it for later rows.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum

import torch
from torch import Tensor

GLOBAL = -1  # ``group`` of rows that see all before them: prefix, links, query, answer, fresh
NO_CHUNK = -1  # ``chunk`` of a row that belongs to no chunk
NO_ROW = -1  # ``supersedes`` of a row that replaces no other row
FOREVER = 1 << 30  # ``until`` of a row that exists in every layer


class Kind(IntEnum):
    """The kind of a row. Visibility depends on PAD and BLANK only; the others are for counting."""

    PAD = 0
    PREFIX = 1
    CHUNK = 2
    LINK = 3
    QUERY = 4
    ANSWER = 5
    BLANK = 6  # encoded with a chunk and then hidden: only its own chunk sees it
    WRAP = 7  # a learned token that opens or closes its chunk, encoded and cached with it


# Plain ints, because in a compiled mask a comparison with an enum member is silently wrong.
_PAD, _BLANK = int(Kind.PAD), int(Kind.BLANK)


@dataclass(frozen=True)
class Rows:
    """Attributes of rows. Every field is an int64 tensor of the same shape.

    The shape is ``(B, S)`` in a `Layout`; masks are built from two views that broadcast,
    ``(..., R, 1)`` against ``(..., 1, N)``. The original and the fresh row of a token have the same
    order. A group is one chunk, or several with block dropout. Rows that end early let CacheBlend
    recompute all tokens in its first layers and few in the others.
    """

    kind: Tensor  # a `Kind`
    chunk: Tensor  # index of its chunk in the prompt, or `NO_CHUNK`; for a link: of its chunk
    offset: Tensor  # index of the token in its piece (chunk, prefix, query); for a link: its slot
    position: Tensor  # for RoPE; may repeat (parallel placement) or jump
    order: Tensor  # index in the causal order, in tokens; windows are measured in it
    group: Tensor  # `GLOBAL` rows see all rows before them, others only their own group
    sample: Tensor  # index of its prompt in a packed row
    supersedes: Tensor  # index of the original that it replaces for later global rows, or `NO_ROW`
    until: Tensor  # first layer (0-based) in which it no longer exists, or `FOREVER`

    def map(self, function) -> Rows:
        """Applies ``function`` to every field."""
        return replace(self, **{f.name: function(getattr(self, f.name)) for f in fields(self)})

    def concat(self, other: Rows) -> Rows:
        """Concatenates these rows and ``other`` along the last axis."""
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in fields(self))
        return type(self)(*(torch.cat(pair, dim=-1) for pair in pairs))


@dataclass(frozen=True)
class Layout(Rows):
    """The rows of one batch; ValueError if not all fields are int64 tensors ``(B, S)``."""

    def __post_init__(self):
        shape = self.kind.shape
        for field in fields(self):
            value = getattr(self, field.name)
            if value.shape != shape or value.ndim != 2 or value.dtype != torch.int64:
                raise ValueError(
                    f"layout fields must be int64 tensors of one shape (batch, rows); 'kind' is "
                    f"{tuple(shape)}, '{field.name}' is {tuple(value.shape)} {value.dtype}"
                )

    @property
    def batch_size(self) -> int:
        """Number of batch entries, B: prompts, or packs of prompts."""
        return self.kind.shape[0]

    @property
    def num_rows(self) -> int:
        """Number of rows per batch entry, S: at least one per token, plus fresh rows."""
        return self.kind.shape[1]

    @property
    def device(self) -> torch.device:
        """Device of the fields."""
        return self.kind.device

    @property
    def is_pad(self) -> Tensor:
        """Padding rows, ``(B, S)`` bool."""
        return self.kind == Kind.PAD

    @property
    def is_fresh(self) -> Tensor:
        """Second rows of recomputed tokens, ``(B, S)`` bool."""
        return self.supersedes != NO_ROW

    @property
    def is_context(self) -> Tensor:
        """Original chunk tokens (the denominator of ``recompute_ratio``), ``(B, S)`` bool."""
        return (self.kind == Kind.CHUNK) & ~self.is_fresh

    @property
    def is_encoded(self) -> Tensor:
        """Rows in a chunk's cache: its tokens, headers and trailers, ``(B, S)`` bool."""
        return ((self.kind == Kind.CHUNK) | (self.kind == Kind.WRAP)) & ~self.is_fresh

    @property
    def written(self) -> Tensor | None:
        """Rows that encode chunks, with blanks, ``(B, S)`` bool; None if there are none."""
        rows = (self.group != GLOBAL) & ~self.is_pad
        return rows if bool(rows.any()) else None

    @property
    def endings(self) -> tuple[int, ...]:
        """Layers in which some rows no longer exist, ascending; see `LayerRule.first_alike`."""
        return tuple(self.until[self.until != FOREVER].unique().tolist())

    @property
    def superseded_until(self) -> Tensor:
        """First layer in which no fresh row supersedes the row: 0 to `FOREVER`, ``(B, S)``."""
        result = torch.zeros_like(self.supersedes)
        target = torch.where(self.is_fresh, self.supersedes, 0)
        life = torch.where(self.is_fresh, self.until, 0)
        return result.scatter_reduce(1, target, life, "amax")

    def to(self, device: torch.device | str) -> Layout:
        """Moves all fields to a device."""
        return self.map(lambda field: field.to(device))

    def pack(self) -> Tensor:
        """Stacks the fields as ``(B, S, fields)``, for collators and other processes."""
        return torch.stack([getattr(self, f.name) for f in fields(self)], dim=-1)

    @classmethod
    def unpack(cls, packed: Tensor) -> Layout:
        """Inverse of `pack`."""
        return cls(*packed.unbind(-1))

    def rows(self) -> Rows:
        """The same fields without the check of shapes, so that they can be indexed."""
        return Rows(**{f.name: getattr(self, f.name) for f in fields(self)})


def append_fresh(layout: Layout, rows: Tensor, until: int = FOREVER) -> Layout:
    """Appends a fresh copy of each of ``rows`` ``(R,)`` to one prompt's layout; see `Rows`."""
    copies = layout.map(lambda field: field[:, rows])
    group, ends = torch.full_like(copies.group, GLOBAL), torch.full_like(copies.until, until)
    return layout.concat(replace(copies, group=group, supersedes=rows[None], until=ends))


@dataclass(frozen=True)
class LayerRule:
    """The part of the visibility rule that depends on the layer."""

    layer: int = 0  # 0-based; only rows with ``until > layer`` exist
    window: int | None = None  # a row sees itself and ``window - 1`` before it, by ``order``

    def first_alike(self, endings: tuple[int, ...]) -> LayerRule:
        """The rule of the first layer with the same rows, to share a mask; see `Layout.endings`."""
        return replace(self, layer=max((end for end in endings if end <= self.layer), default=0))


FIRST_LAYER = LayerRule()  # of all layers, if no row ends early and there is no window


def visible(
    query: Rows, key: Rows, superseded_until: Tensor, rule: LayerRule = FIRST_LAYER
) -> Tensor:
    """The visibility rule, by which every mask is made.

    Args:
        query: Query rows, each field broadcastable, e.g. ``(B, R, 1)``.
        key: Key rows, e.g. ``(B, 1, N)``.
        superseded_until: `Layout.superseded_until` of the key rows, shaped like ``key``.
        rule: The layer's part of the rule.

    Returns:
        Bool, the broadcast shape: True where the query row sees the key row. Padding and rows that
        have ended see nothing; an execution must keep their output finite.

    Source: Block-Attention arXiv:2409.15355 and KVLink arXiv:2502.16002 (documents see only
    themselves, links and query see all before them); superseding rows are our own.
    """
    exists = (query.kind != _PAD) & (key.kind != _PAD)
    exists = exists & (query.until > rule.layer) & (key.until > rule.layer)
    before = (query.sample == key.sample) & (key.order <= query.order)
    if rule.window is not None:
        before = before & (query.order - key.order < rule.window)
    in_group = query.group == key.group
    current = (key.kind != _BLANK) & (superseded_until <= rule.layer)
    return exists & before & torch.where(query.group == GLOBAL, current, in_group)
