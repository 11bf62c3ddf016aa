"""Checks on a given model that chunk reuse is sound.

What the tests prove for small random models need not hold for a new architecture, a custom kernel
or a converted checkpoint. So the same equivalences are checked on the user's model, with its own
tokenizer and template, before it is served.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from blocktune.attention import DensePlan, SplitPlan
from blocktune.check.claim import Check, difference, is_exact, tolerance_of
from blocktune.check.serving import all_visible
from blocktune.data.example import RagExample
from blocktune.engine import Engine
from blocktune.layout import GLOBAL
from blocktune.methods import Method, build
from blocktune.prompt import Batch, Chunk, stack

QUESTION = "Which of the two cities was founded first?"
TEXTS = (
    (
        "Aldermere",
        "Aldermere is a harbour city. It was founded in 1204 by fishermen from the coast.",
    ),
    (None, "Its old lighthouse was rebuilt twice and now holds a small museum of the sea."),
    ("Norwick", "Norwick lies inland, two days from Aldermere. The town was founded in 1310."),
)


def check_model(engine: Engine) -> list[Check]:
    """Runs all checks of a model.

    Args:
        engine: Of the model, with its adapter if it has one. Its caches are used.

    Returns:
        One `Check` per claim; reuse is sound on the model if all passed.
    """
    with torch.no_grad():
        return list(_checks(engine))


def _checks(engine: Engine) -> Iterator[Check]:
    seen: list[float] = []
    example = _example(3)
    full = engine.next_logits([example], "full-prefill")
    tolerance = tolerance_of(engine, full)

    def close(name: str, left: Tensor, right: Tensor) -> Check:
        moved = difference(left, right)
        seen.append(moved)
        return Check(name, moved <= tolerance, moved, tolerance)

    plain = _plain(engine)
    block = _batch(engine, example, plain)
    dense = _forward(engine, block, DensePlan(block.layout))
    yield close("full prefill = stock attention", full, _stock(engine, example))
    split = _forward(engine, block, SplitPlan(block.layout))
    yield close("split = dense mask", split[:, -1], dense[:, -1])
    yield close("cached chunks = dense mask", engine.next_logits([example], plain), dense[:, -1])
    visible, spec = _visible(engine, block), engine.prompts.spec(plain)
    if not spec.num_learned:  # fresh tokens are not all that a question sees
        in_place = spec.placement == "sequential"  # elsewhere chunks share positions
        same = full if in_place else visible
        told = "full prefill" if in_place else "full attention at the same positions"
        for method in (build("epic", k=1 << 20), build("cacheblend", ratio=1.0)):
            fresh = engine.next_logits([example], method)
            name = "all tokens fresh" if method.name == "epic" else "ratio 1"
            yield close(f"{name} = {told}", fresh, same)
    yield close("batch = single", *_batched(engine, plain))
    yield close("decoding = one forward", *_decoded(engine, example))
    moved = difference(dense[:, -1], visible)
    # In half precision, rounding is closer to the effect of a hidden chunk.
    wanted = (10 if is_exact(engine) else 3) * max(seen)
    yield Check("hiding chunks from each other is seen", moved >= wanted, moved, wanted)


def _example(num_chunks: int) -> RagExample:
    chunks = tuple(Chunk(text, title) for title, text in TEXTS[:num_chunks])
    return RagExample(question=QUESTION, chunks=chunks, answers=("Aldermere",))


def _plain(engine: Engine) -> Method:
    """Reuse without recomputation, in the form that the engine's weights were trained for."""
    trained = engine.prompts.trained
    if trained is None or not trained.num_learned:
        return build("naive")
    return build("kvlink" if trained.num_links else "kv-packet")


def _batch(engine: Engine, example: RagExample, method: Method) -> Batch:
    pieces, spec = engine.prompts.pieces(example, method), engine.prompts.spec(method)
    return stack([engine.prompts.prompt(pieces, spec)], pad_id=0).to(engine.model.device)


def _forward(engine: Engine, batch: Batch, plan) -> Tensor:
    position = batch.layout.position
    logits = engine.model(batch.input_ids, position_ids=position, plan=plan, use_cache=False).logits
    return logits[:, ~batch.layout.is_pad[0]]


def _visible(engine: Engine, batch: Batch) -> Tensor:
    """Logits ``(1, V)`` of one prompt with the same positions and nothing hidden."""
    ids, layout = all_visible(batch.input_ids, batch.layout)
    plan = DensePlan(layout)
    output = engine.model(ids, position_ids=layout.position, plan=plan, use_cache=False)
    return output.logits[:, -1]


def _stock(engine: Engine, example: RagExample) -> Tensor:
    """The stock model: its own attention, no layout and no cache."""
    batch = _batch(engine, example, build("full-prefill"))
    assert bool((batch.layout.group == GLOBAL).all())
    return engine.model(batch.input_ids, use_cache=False).logits[:, -1]


def _batched(engine: Engine, method: Method) -> tuple[Tensor, Tensor]:
    examples = [_example(3), _example(1), _example(2)]
    single = [engine.next_logits([example], method) for example in examples]
    return engine.next_logits(examples, method), torch.cat(single)


def _decoded(engine: Engine, example: RagExample) -> tuple[Tensor, Tensor]:
    """Logits after two decoded tokens, over the cache and in one forward."""
    ids, logits = engine.continued_logits(example, "full-prefill", num_tokens=2)
    batch = _batch(engine, example, build("full-prefill"))
    more = torch.tensor([ids], device=batch.input_ids.device)
    whole = engine.model(torch.cat([batch.input_ids, more], dim=1), use_cache=False).logits
    return logits, whole[:, -1]
