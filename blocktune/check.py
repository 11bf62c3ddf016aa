"""Whether chunk reuse is sound on a given model: the project's equivalences, on that very model.

What a test suite proves for small random models need not hold for the next architecture, a
custom kernel or a converted checkpoint. So the same claims are checked on the user's model,
with its own tokenizer and template, before it is served.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from blocktune.attention import DensePlan, SplitPlan
from blocktune.data.example import RagExample
from blocktune.engine import Engine
from blocktune.layout import GLOBAL
from blocktune.prompt import Batch, Chunk, LayoutSpec, stack
from blocktune.reuse import Method, build

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest accepted difference of logits, as a share of the largest logit. Float32 rounding stays
well under 1e-5 here and a wrong mask moves logits by more than 1e-2; bfloat16 keeps 8 bits."""

QUESTION = "Which of the two cities was founded first?"
TEXTS = (
    (
        "Aldermere",
        "Aldermere is a harbour city. It was founded in 1204 by fishermen from the coast.",
    ),
    (None, "Its old lighthouse was rebuilt twice and now holds a small museum of the sea."),
    ("Norwick", "Norwick lies inland, two days from Aldermere. The town was founded in 1310."),
)


@dataclass(frozen=True)
class Check:
    """One claim and how far from it the model is.

    Attributes:
        name: The claim.
        passed: Whether it holds.
        max_abs_diff: Largest difference of logits seen.
        tolerance: Largest difference accepted; for the claim that the checks can fail at all,
            the smallest one wanted: a multiple of what the others differ by.
    """

    name: str
    passed: bool
    max_abs_diff: float
    tolerance: float

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return asdict(self)


def check_model(engine: Engine) -> list[Check]:
    """Runs all checks.

    Args:
        engine: Made for the model, with its adapter if it has one. Its caches are used.

    Returns:
        One `Check` per claim; reuse is sound on the model if all passed.
    """
    with torch.no_grad():
        return list(_checks(engine))


def _checks(engine: Engine) -> Iterator[Check]:
    seen: list[float] = []
    example = _example(3)
    full = engine.next_logits([example], "full-prefill")
    tolerance = _tolerance(engine, full)

    def close(name: str, left: Tensor, right: Tensor) -> Check:
        difference = _difference(left, right)
        seen.append(difference)
        return Check(name, difference <= tolerance, difference, tolerance)

    plain = build("naive")
    block = _batch(engine, example, _spec(engine, plain))
    dense = _forward(engine, block, DensePlan(block.layout))
    yield close("full prefill = stock attention", full, _stock(engine, example))
    split = _forward(engine, block, SplitPlan(block.layout))
    yield close("split = dense mask", split[:, -1], dense[:, -1])
    yield close("cached chunks = dense mask", engine.next_logits([example], plain), dense[:, -1])
    for method in (build("epic", k=1 << 20), build("cacheblend", ratio=1.0)):
        if _spec(engine, method).num_links:
            continue  # full prefill has no links: with them there is nothing to be equal to
        fresh = engine.next_logits([example], method)
        name = "all tokens fresh" if method.selection().check_layer is None else "ratio 1"
        yield close(f"{name} = full prefill", fresh, full)
    yield close("batch = single", *_batched(engine, plain))
    yield close("decoding = one forward", *_decoded(engine, example))
    moved = _difference(dense[:, -1], full)
    # Half precision leaves less room between rounding and what a hidden chunk changes.
    wanted = (10 if engine.model.dtype == torch.float32 else 3) * max(seen)
    yield Check("hiding chunks from each other is seen", moved >= wanted, moved, wanted)


def _example(num_chunks: int) -> RagExample:
    chunks = tuple(Chunk(text, title) for title, text in TEXTS[:num_chunks])
    return RagExample(question=QUESTION, chunks=chunks, answers=("Aldermere",))


def _tolerance(engine: Engine, logits: Tensor) -> float:
    return RELATIVE_TOLERANCE[engine.model.dtype] * max(1.0, float(logits.float().abs().max()))


def _difference(left: Tensor, right: Tensor) -> float:
    return float((left.float() - right.float()).abs().max())


def _spec(engine: Engine, method: Method) -> LayoutSpec:
    return engine.prompts.spec(method)


def _batch(engine: Engine, example: RagExample, spec: LayoutSpec) -> Batch:
    pieces = engine.prompts.pieces(example, build("naive"))
    return stack([engine.prompts.prompt(pieces, spec)], pad_id=0).to(engine.model.device)


def _forward(engine: Engine, batch: Batch, plan) -> Tensor:
    position = batch.layout.position
    logits = engine.model(batch.input_ids, position_ids=position, plan=plan, use_cache=False).logits
    return logits[:, ~batch.layout.is_pad[0]]


def _stock(engine: Engine, example: RagExample) -> Tensor:
    """The model by itself, with its own attention, no layout and no cache."""
    batch = _batch(engine, example, LayoutSpec(block=False))
    assert bool((batch.layout.group == GLOBAL).all())
    with engine.stock_attention() as model:
        return model(batch.input_ids, use_cache=False).logits[:, -1]


def _batched(engine: Engine, method: Method) -> tuple[Tensor, Tensor]:
    examples = [_example(3), _example(1), _example(2)]
    single = [engine.next_logits([example], method) for example in examples]
    return engine.next_logits(examples, method), torch.cat(single)


def _decoded(engine: Engine, example: RagExample) -> tuple[Tensor, Tensor]:
    """Logits after two decoded tokens, over the cache and in one forward."""
    ids, logits = engine.continued_logits(example, "full-prefill", num_tokens=2)
    batch = _batch(engine, example, LayoutSpec(block=False))
    more = torch.tensor([ids], device=batch.input_ids.device)
    with engine.stock_attention() as model:
        whole = model(torch.cat([batch.input_ids, more], dim=1), use_cache=False).logits
    return logits, whole[:, -1]
