"""Small engines, and what a request's answer would be by one dense forward."""

import dataclasses
from typing import NamedTuple

import torch
from families import build

from blocktune.attention import dense_mask
from blocktune.attention.kernels import plain_attention
from blocktune.engine import Engine
from blocktune.layout import FOREVER, GLOBAL, Kind, Layout
from blocktune.methods import Method
from blocktune.prompt import Chunk, PromptFormat, stack


@dataclasses.dataclass(frozen=True)
class Ask:
    question: str
    chunks: tuple[Chunk, ...]


ASK = Ask(
    "Who directed the film?",
    (
        Chunk("Anna Belt was born in Port Alder and studied there.", "Anna Belt"),
        Chunk("She later moved to Lower Kirby."),
        Chunk("The film Frozen Shore was directed by Noel Fisher.", "Frozen Shore"),
    ),
)
SHORT = Ask("Who?", (Chunk("It was shot in 1966."), Chunk("The company is based in Upper Lorne.")))
FORMAT = PromptFormat(instruction="Answer from the passages.")


def engine_of(config, tokenizer, format=FORMAT, **more) -> Engine:
    """An engine over a random model with the test tokenizer's vocabulary."""
    config.vocab_size = len(tokenizer)
    return Engine(build(config), tokenizer, format=format, **more)


class Span(NamedTuple):
    """Layers in which a token is fresh: from ``since``, where it has the state it is stored with,
    up to ``until``; ``column`` is its order."""

    column: int
    since: int
    until: int


class StoredPlan:
    """The dense oracle where tokens become fresh in the middle.

    A fresh row stands for its original in the layers before: it sees what that sees and nobody
    sees it, so that it carries what the chunk alone carried into the layer that it starts in.
    """

    def __init__(self, layout: Layout, since: torch.Tensor):
        """Rows ``(1, S)`` whose fresh ones start at layer ``since`` ``(1, S)``."""
        self.layout, self.since = layout, since

    def attend(self, query, key, value, rule, params):
        early = self.since > rule.layer
        ended = self.layout.until.masked_fill(early, 0)
        mask = dense_mask(dataclasses.replace(self.layout, until=ended), rule)[0, 0]
        rows = early[0].nonzero().squeeze(1)
        mask[rows] = mask[self.layout.supersedes[0, rows]]
        out = plain_attention(query, key, value, mask[None, None], params)
        return out.transpose(1, 2)


def dense_logits(engine: Engine, ask: Ask, method: Method, spans=()) -> torch.Tensor:
    """Logits after the last prompt row ``(V,)``, from one forward under the dense mask.

    Args:
        engine: Its model runs.
        ask: The request.
        method: Gives the layout.
        spans: Which tokens are fresh in which layers, a `Span` each.
    """
    prompt = engine.lay_out(engine.prompts.pieces(ask, method), method)
    batch = stack([prompt], pad_id=0)
    last = batch.layout.num_rows - 1
    ids, layout = with_fresh_rows(batch.input_ids, batch.layout, spans)
    since = torch.zeros_like(layout.kind)
    since[0, last + 1 :] = torch.tensor([span.since for span in spans], dtype=torch.int64)
    plan = StoredPlan(layout, since)
    with torch.no_grad():
        output = engine.model(ids, position_ids=layout.position, plan=plan, use_cache=False)
    return output.logits[0, last]


def with_fresh_rows(ids, layout: Layout, spans) -> tuple[torch.Tensor, Layout]:
    """Appends a second row for each span: the definition of recomputation, row by row."""
    rows = [int((layout.is_context & (layout.order == s.column))[0].nonzero()) for s in spans]
    second = layout.map(lambda field: field[:, rows])
    second = dataclasses.replace(
        second,
        group=torch.full_like(second.group, GLOBAL),
        supersedes=torch.tensor([rows], dtype=torch.int64),
        until=torch.tensor([[span.until for span in spans]], dtype=torch.int64),
    )
    joined = torch.cat([layout.pack(), second.pack()], dim=1)
    return torch.cat([ids, ids[:, rows]], dim=1), Layout.unpack(joined)


def served_spans(engine: Engine, ask: Ask, method: Method) -> tuple[torch.Tensor, list[Span]]:
    """Logits ``(V,)`` of a served request, and which tokens were computed in which layers."""
    run = engine.prefilled([ask], method)
    depth = len(run.cache)
    fresh: list[set[int]] = [set() for _ in range(depth)]
    for plan in run.prefill.plans:
        for layer in plan.executed:
            fresh[layer] |= context_columns(plan)
    if method.select().keeps_keys:
        for layer, plan in run.prefill.probes.items():
            fresh[layer] |= context_columns(plan)
    spans = []
    for column in sorted(set().union(*fresh)):
        layers = [layer for layer in range(depth) if column in fresh[layer]]
        starts = [layer for layer in layers if layer - 1 not in layers]
        ends = [layer + 1 for layer in layers if layer + 1 not in layers]
        ends = [FOREVER if end == depth else end for end in ends]
        spans += map(Span, [column] * len(starts), starts, ends)
    return run.prefill.logits[0], spans


def context_columns(plan) -> set[int]:
    """Columns of the chunk tokens that a plan computes."""
    return set(plan.query.order[plan.query.kind == Kind.CHUNK].tolist())


__all__ = [
    "ASK",
    "FOREVER",
    "FORMAT",
    "SHORT",
    "Ask",
    "Span",
    "dense_logits",
    "engine_of",
    "served_spans",
]
