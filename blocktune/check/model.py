"""Checks on a given model that chunk reuse is sound.

What the tests prove for small random models need not hold for a new architecture, a custom kernel
or a converted checkpoint. So the same equivalences are checked on the user's model, with its own
tokenizer and template, before it is served.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from blocktune.attention import SplitPlan
from blocktune.check.serving import (
    ALONE,
    ASK,
    SHORT,
    Check,
    all_visible,
    batch_of,
    difference,
    forward_dense,
    tolerance_of,
)
from blocktune.engine import Engine
from blocktune.layout import GLOBAL
from blocktune.methods import Method, build
from blocktune.models.quantize import quantization_of


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
    full = engine.next_logits([ASK], "full-prefill")
    tolerance = tolerance_of(engine, full)

    def close(name: str, left: Tensor, right: Tensor) -> Check:
        moved = difference(left, right)
        seen.append(moved)
        return Check(name, moved <= tolerance, moved, tolerance)

    plain = _plain(engine)
    block = batch_of(engine, plain)
    dense = forward_dense(engine, block.input_ids, block.layout)[:, -1]
    visible = forward_dense(engine, *all_visible(block.input_ids, block.layout))[:, -1]
    whole = batch_of(engine, build("full-prefill"))
    assert bool((whole.layout.group == GLOBAL).all())
    stock = engine.model(whole.input_ids, use_cache=False).logits[:, -1]
    yield close("full prefill = stock attention", full, stock)
    split = engine.model(
        block.input_ids,
        position_ids=block.layout.position,
        plan=SplitPlan(block.layout),
        use_cache=False,
    )
    yield close("split = dense mask", split.logits[:, -1], dense)
    yield close("cached chunks = dense mask", engine.next_logits([ASK], plain), dense)
    spec = engine.prompts.spec(plain)
    if not spec.num_learned:  # fresh tokens are not all that a question sees
        in_place = spec.placement == "sequential"  # elsewhere chunks share positions
        same = full if in_place else visible
        told = "full prefill" if in_place else "full attention at the same positions"
        for method in (build("epic", k=1 << 20), build("cacheblend", ratio=1.0)):
            fresh = engine.next_logits([ASK], method)
            name = "all tokens fresh" if method.name == "epic" else "ratio 1"
            yield close(f"{name} = {told}", fresh, same)
    asks = [ASK, ALONE, SHORT]
    single = torch.cat([engine.next_logits([ask], plain) for ask in asks])
    yield close("batch = single", engine.next_logits(asks, plain), single)
    ids, after = engine.continued_logits(ASK, "full-prefill", num_tokens=2)
    longer = torch.cat([whole.input_ids, whole.input_ids.new_tensor([ids])], dim=1)
    again = engine.model(longer, use_cache=False).logits[:, -1]
    yield close("decoding = one forward", after, again)
    moved = difference(dense, visible)
    # In half precision and int8, rounding is closer to the effect of a hidden chunk.
    exact = engine.model.dtype == torch.float32 and quantization_of(engine.model) != "int8"
    wanted = (10 if exact else 3) * max(seen)
    yield Check("hiding chunks from each other is seen", moved >= wanted, moved, wanted)


def _plain(engine: Engine) -> Method:
    """Reuse without recomputation, in the form that the engine's weights were trained for."""
    trained = engine.prompts.trained
    if trained is None or not trained.num_learned:
        return build("naive")
    return build("kvlink" if trained.num_links else "kv-packet")
