"""Small engines, and what a request's answer would be by one dense forward."""

import dataclasses

import torch
from families import build

from blocktune.attention import DensePlan
from blocktune.engine import Engine
from blocktune.layout import FOREVER, GLOBAL, Layout
from blocktune.prompt import Chunk, PromptFormat, stack
from blocktune.reuse import Method


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


def dense_logits(engine: Engine, ask: Ask, method: Method, fresh=None) -> torch.Tensor:
    """Logits after the last prompt row ``(V,)``, from one forward under the dense mask.

    Args:
        engine: Its model runs.
        ask: The request.
        method: Gives the layout.
        fresh: Column (order) of every token that is fresh, with the layer at which it ends.
    """
    pieces = engine.prompts.pieces(ask, method)
    prompt = engine.prompts.prompt(pieces, engine.prompts.spec(method))
    batch = stack([prompt], pad_id=0)
    ids, layout = batch.input_ids, batch.layout
    last = layout.num_rows - 1
    if fresh:
        ids, layout = with_fresh_rows(ids, layout, fresh)
    position = layout.position
    with torch.no_grad():
        output = engine.model(ids, position_ids=position, plan=DensePlan(layout), use_cache=False)
    return output.logits[0, last]


def with_fresh_rows(ids, layout: Layout, fresh: dict[int, int]) -> tuple[torch.Tensor, Layout]:
    """Appends a second row for each fresh token: the definition of recomputation, row by row."""
    rows = [int((layout.is_context & (layout.order == o))[0].nonzero()) for o in fresh]
    second = layout.map(lambda field: field[:, rows])
    second = dataclasses.replace(
        second,
        group=torch.full_like(second.group, GLOBAL),
        supersedes=torch.tensor([rows]),
        until=torch.tensor([[fresh[int(o)] for o in second.order[0]]]),
    )
    joined = torch.cat([layout.pack(), second.pack()], dim=1)
    return torch.cat([ids, ids[:, rows]], dim=1), Layout.unpack(joined)


def until(rows_by_plan: list[tuple[list[int], int]]) -> dict[int, int]:
    """``{column: layer at which it ends}`` from the rows of successive plans."""
    ends = {}
    for rows, end in rows_by_plan:
        for row in rows:
            ends[row] = end
    return ends


__all__ = ["ASK", "FOREVER", "FORMAT", "SHORT", "Ask", "dense_logits", "engine_of", "until"]
