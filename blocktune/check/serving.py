"""Serving a method for a check, and what it must equal: one dense forward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from blocktune.attention import DensePlan
from blocktune.check.claim import ASK, HISTORY, Ask
from blocktune.engine import Engine, Sampling
from blocktune.engine.generation import Generation
from blocktune.layout import GLOBAL, Kind, Layout
from blocktune.methods import Method
from blocktune.prompt import stack

POSITIONS = 256
"""Up to here the tolerance holds; float32 angles are wrong in proportion to the position."""


@dataclass(frozen=True)
class Subject:
    """A method on an engine.

    Attributes:
        method: Whose contract it is.
        engine: With the weights that the method needs.
        bare: Another one, in whose prompts nothing stands before the first chunk.
    """

    method: Method
    engine: Engine
    bare: Engine

    def begin(self, history: Sequence[Ask] = HISTORY) -> Engine:
        """The engine with empty caches, or the history that the method lives on."""
        return begun(self.engine, self.method, history)

    def run(self, method: Method, ask: Ask = ASK, answer: tuple[int, ...] = ()) -> Generation:
        """A request up to its first logits, or those after ``answer`` given beforehand."""
        self.begin()
        pieces = self.engine.prompts.pieces(ask, method)._replace(answer=answer)
        return self.engine.start([pieces], method)

    def logits(self, method: Method) -> Tensor:
        """``(V,)`` after the prompt of `ASK`."""
        return self.run(method).prefill.logits[0]


def begun(engine: Engine, method: Method, history: Sequence[Ask] = HISTORY) -> Engine:
    """The engine with empty caches; of a method with a history, as ``history`` leaves them."""
    engine.forget()
    if method.history is not None:
        for ask in history:
            next(engine.prefilled([ask], method).tokens(Sampling(), 1))
    return engine


def chosen_rows(run: Generation, until: int = 1 << 30) -> list[list[int]]:
    """Chunk tokens that were computed, by pass, as columns of the first prompt below ``until``."""
    rows = [plan.query.map(lambda field: field[0]) for plan in run.prefill.plans]
    return [one.order[(one.kind == Kind.CHUNK) & (one.order < until)].tolist() for one in rows]


def question_start(run: Generation) -> int:
    """Column at which the question begins."""
    layout = run.batch.layout
    return int(layout.order[layout.kind == Kind.QUERY].min())


def last_chunk_start(run: Generation) -> int:
    """Column at which the last chunk's tokens begin, or the question where there is no chunk."""
    layout = run.batch.layout
    last = layout.is_context & (layout.chunk == layout.chunk.max())
    return int(layout.order[last].min()) if bool(last.any()) else question_start(run)


def dense_logits(
    subject: Subject, method: Method, rows: Callable[[Tensor, Layout], tuple] | None = None
) -> Tensor:
    """Logits ``(V,)`` after the prompt, in one forward under the dense mask of its layout.

    Args:
        subject: Whose engine and history it is.
        method: Says how the prompt is laid out.
        rows: Changes ids and layout first, such as `all_visible`; a prompt's own rows come first.
    """
    engine = subject.begin()
    prompt = engine.lay_out(engine.prompts.pieces(ASK, method), method)
    batch = stack([prompt], pad_id=0).to(engine.model.device)
    ids, layout = batch.input_ids, batch.layout
    if rows is not None:
        ids, layout = rows(ids, layout)
    position = layout.position
    output = engine.model(ids, position_ids=position, plan=DensePlan(layout), use_cache=False)
    return output.logits[0, int(layout.is_fresh.logical_not().sum()) - 1]


def all_visible(ids: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """The same rows in full attention: nothing hidden, each row sees all before it."""
    kept = layout.kind[0] != Kind.BLANK
    layout = layout.map(lambda field: field[:, kept])
    return ids[:, kept], replace(layout, group=torch.full_like(layout.group, GLOBAL))


def all_fresh(ids: Tensor, layout: Layout) -> tuple[Tensor, Layout]:
    """Every token of a chunk once more, seeing all before it and seen in place of the first.

    What wraps a chunk keeps the one row that it is stored with, which saw the chunk alone.
    """
    rows = layout.is_context[0].nonzero().squeeze(1)
    again = layout.map(lambda field: field[:, rows])
    again = replace(
        again, group=torch.full_like(again.group, GLOBAL), supersedes=rows.expand_as(again.kind)
    )
    both = torch.cat([layout.pack(), again.pack()], dim=1)
    return torch.cat([ids, ids[:, rows]], dim=1), Layout.unpack(both)


def reach(engine: Engine, method: Method, ask: Ask) -> float:
    """How much larger than usual the tolerance is, for the positions that a prompt reaches."""
    prompt = engine.prompts.prompt(engine.prompts.pieces(ask, method), engine.prompts.spec(method))
    return max(1.0, int(prompt.layout.position.max()) / POSITIONS)
