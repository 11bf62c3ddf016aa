"""Reshaped attention as the papers write it, a row and a head at a time."""

from typing import NamedTuple

import torch
from engine.served import with_fresh_rows

from blocktune.attention import dense_mask
from blocktune.attention.kernels import AttentionParams
from blocktune.layout import GLOBAL, Kind, LayerRule, Layout
from blocktune.prompt import stack


class Row(NamedTuple):
    """One row and head: its scores, values, and the columns that it sees, all float64.

    A model with attention sinks (GPT-OSS) has one more column, seen by all, whose value is zero.
    """

    scores: torch.Tensor  # (N,) or (N + 1,)
    values: torch.Tensor  # likewise, (.., D)
    seen: torch.Tensor  # likewise, bool

    def in_columns(self, facts: torch.Tensor) -> torch.Tensor:
        """Facts ``(N,)`` of the tokens' columns, False for a sink."""
        return torch.nn.functional.pad(facts, (0, len(self.seen) - len(facts)))


class RowByRow:
    """A plan over the dense mask; rows over everything are merged by ``merge``."""

    def __init__(self, layout: Layout):
        self.layout = layout
        self.reused = (layout.kind == Kind.CHUNK) & ~layout.is_fresh

    def attend(self, query, key, value, rule: LayerRule, params: AttentionParams):
        shared = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(shared, 1).double() for x in (key, value))
        scores = query.double() @ key.transpose(-1, -2) * params.scaling
        if params.softcap is not None:
            scores = params.softcap * torch.tanh(scores / params.softcap)
        mask = dense_mask(self.layout, rule)[:, 0]
        if params.sinks is not None:
            sinks = params.sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, sinks], -1)
            value = torch.cat([value, torch.zeros_like(value[:, :, :1])], 2)
            mask = torch.nn.functional.pad(mask, (0, 1), value=True)
        out = torch.zeros(*query.shape[:3], value.shape[-1], dtype=torch.float64)
        plain = scores.masked_fill(~mask[:, None], float("-inf")).softmax(-1).nan_to_num(0.0)
        out[:] = plain @ value
        self.prepare(rule, plain)
        for b, r in ((self.layout.group == GLOBAL) & ~self.layout.is_pad).nonzero().tolist():
            for h in range(query.shape[1]):
                row = Row(scores[b, h, r], value[b, h], mask[b, r])
                if row.seen.any():
                    out[b, h, r] = self.merge(row, b, h, r)
        return out.to(query.dtype).transpose(1, 2)

    def prepare(self, rule: LayerRule, weights) -> None:
        """Before the rows of a layer: plain attention weights ``(B, H, N, N)``."""


class TwoSoftmaxes(RowByRow):
    """APE's merge, with the recomputed tokens among the others as in PSR."""

    def __init__(self, layout: Layout, temperature: float, scale: float):
        super().__init__(layout)
        self.temperature, self.scale = temperature, scale

    def merge(self, row: Row, b: int, h: int, r: int):
        reused = row.in_columns(self.reused[b])
        context, other = row.seen & reused, row.seen & ~reused
        outs, sums = [], []
        for group, temperature in ((context, self.temperature), (other, 1.0)):
            if group.any():
                scores = row.scores[group] / temperature
                outs.append(scores.softmax(0) @ row.values[group])
                sums.append(scores.logsumexp(0))
                if group is context:
                    sums[-1] = self.scale * self.temperature * sums[-1]
        weights = torch.stack(sums).softmax(0)
        return sum(weight * out for weight, out in zip(weights, outs, strict=True))


class BestChunks(RowByRow):
    """SEL's choice of chunks."""

    def __init__(self, layout: Layout, chunks: int, aggregation: str, ahead: dict | None = None):
        super().__init__(layout)
        self.chunks, self.aggregation, self.ahead = chunks, aggregation, ahead
        self.num_chunks = int(layout.chunk.max()) + 1
        self.totals: dict[int, torch.Tensor] = {}  # by layer, what the question sums up to

    def prepare(self, rule, weights):
        batch, heads, rows, _ = weights.shape
        each = torch.zeros(batch, heads, rows, self.num_chunks, dtype=torch.float64)
        for b in range(batch):
            for chunk in range(self.num_chunks):
                own = (self.layout.chunk[b] == chunk) & (self.layout.kind[b] == Kind.CHUNK)
                best = (
                    weights[b, :, :, own.nonzero()[:, 0]].sort(-1, descending=True).values[..., :5]
                )
                each[b, :, :, chunk] = best.sum(-1)
        asks = (self.layout.kind == Kind.QUERY)[:, None, :, None]
        total = (each * asks).sum(2, keepdim=True)
        self.totals[rule.layer] = total.sum(1, keepdim=True)
        if self.aggregation in ("T", "HT"):
            each = torch.where(asks, total, each)
        if self.aggregation == "HT":
            each = each.sum(1, keepdim=True).expand_as(each)
        if self.aggregation == "LHT" and self.ahead is not None:
            each = sum(self.ahead.values()).expand_as(each)
        self.each = each

    def merge(self, row, b, h, r):
        own = int(self.layout.chunk[b, r]) if self.layout.kind[b, r] == Kind.CHUNK else None
        ranked = sorted(range(self.num_chunks), key=lambda c: -float(self.each[b, h, r, c]))
        kept = [c for c in ranked if c != own][: self.chunks] + ([] if own is None else [own])
        in_chunk = self.layout.kind[b] == Kind.CHUNK
        hidden = in_chunk & ~torch.isin(self.layout.chunk[b], torch.tensor(kept))
        if self.aggregation == "LHT" and self.ahead is None:
            hidden = torch.zeros_like(hidden)
        seen = row.seen & ~row.in_columns(hidden)
        return row.scores[seen].softmax(0) @ row.values[seen]


def rows_of(engine, ask, method, fresh=None, answer=()):
    """Ids and layout of a request, a second row for each fresh token, and the row to read."""
    pieces = engine.prompts.pieces(ask, method)._replace(answer=tuple(answer))
    prompt = engine.prompts.prompt(pieces, engine.prompts.spec(method))
    batch = stack([prompt], pad_id=0)
    ids, layout, last = batch.input_ids, batch.layout, batch.layout.num_rows - 1
    if fresh:
        ids, layout = with_fresh_rows(ids, layout, fresh)
    return ids, layout, last


@torch.no_grad()
def logits_by(engine, ids, plan, last: int):
    """Logits ``(V,)`` at row ``last`` of one forward by ``plan``."""
    position = plan.layout.position
    return engine.model(ids, position_ids=position, plan=plan, use_cache=False).logits[0, last]
