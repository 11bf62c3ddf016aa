"""What is served equals one forward under the dense mask, for every family and RoPE type."""

import pytest
import torch
from engine.served import ASK, FOREVER, SHORT, dense_logits, engine_of, served_spans
from families import EXPERT_FAMILIES, FAMILIES, ROPES

from blocktune.methods import build

MODELS = {**FAMILIES, **{f"rope-{name}": config for name, config in ROPES.items()}}
# Logits of these models reach about 10; prompts have fewer than 256 positions.
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture(params=MODELS)
def engine(request, tokenizer):
    config = MODELS[request.param]()
    if request.param == "mistral":  # all layers slide: the last row must still reach a seam
        config.sliding_window = 40
    return engine_of(config, tokenizer)


METHODS = {
    "naive": build("naive"),
    "epic": build("epic", k=3),
    "cacheblend": build("cacheblend", ratio=0.25),
}


@pytest.mark.parametrize("name", METHODS)
def test_served_logits_match_one_dense_forward(engine, name):
    method = METHODS[name]
    served, spans = served_spans(engine, ASK, method)

    torch.testing.assert_close(served, dense_logits(engine, ASK, method, spans), **TOLERANCE)
    if name != "naive":  # one fresh token less is seen
        last = max(span.column for span in spans if span.until == FOREVER)
        wrong = [span for span in spans if span.column != last]
        moved = (served - dense_logits(engine, ASK, method, wrong)).abs().max()
        assert moved > 10 * TOLERANCE["atol"]


def test_everything_fresh_matches_full_prefill_and_stock_attention(engine):
    full = engine.next_logits([ASK], "full-prefill")
    for method in (build("epic", k=1000), build("epic", share=1.0), build("cacheblend", ratio=1.0)):
        torch.testing.assert_close(engine.next_logits([ASK], method), full, rtol=0, atol=1e-5)
    pieces = engine.prompts.pieces(ASK, build("full-prefill"))
    ids = torch.tensor([pieces.prefix + sum(pieces.chunks, ()) + pieces.query])
    engine.model.set_attn_implementation("eager")
    with torch.no_grad():
        stock = engine.model(ids, use_cache=False).logits[:, -1]
    torch.testing.assert_close(full, stock, **TOLERANCE)


def test_nothing_fresh_matches_naive(engine):
    naive = engine.next_logits([ASK], "naive")
    for method in (build("epic", k=0), build("epic", share=0.0), build("cacheblend", ratio=0.0)):
        torch.testing.assert_close(engine.next_logits([ASK], method), naive, rtol=0, atol=1e-5)
    assert (naive - engine.next_logits([ASK], "full-prefill")).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["full-prefill", "naive", "epic", "cacheblend", "prefix-cache"])
def test_a_ragged_batch_matches_single_prompts(engine, name):
    asks = [ASK, SHORT]
    together = engine.next_logits(asks, name)
    alone = torch.cat([engine.next_logits([ask], name) for ask in asks])
    torch.testing.assert_close(together, alone, **TOLERANCE)


def test_decoding_over_the_cache_matches_one_forward(engine):
    for name in ("full-prefill", "naive"):
        ids, logits = engine.continued_logits(ASK, name, num_tokens=4)
        method = build(name)
        pieces = engine.prompts.pieces(ASK, method)
        whole = pieces._replace(query=pieces.query + ids)
        engine.prompts.prompt(whole, engine.prompts.spec(method))
        longer = dense_logits_of(engine, whole, method)
        torch.testing.assert_close(logits[0], longer, **TOLERANCE)


def dense_logits_of(engine, pieces, method):
    from blocktune.attention import DensePlan
    from blocktune.prompt import stack

    batch = stack([engine.prompts.prompt(pieces, engine.prompts.spec(method))], pad_id=0)
    plan = DensePlan(batch.layout)
    with torch.no_grad():
        output = engine.model(
            batch.input_ids, position_ids=batch.layout.position, plan=plan, use_cache=False
        )
    return output.logits[0, -1]


@pytest.mark.parametrize("family", EXPERT_FAMILIES)
def test_experts_are_chosen_alike_in_both_paths(family, tokenizer):
    """Where routing differed, logits could differ by more than rounding and prove nothing."""
    engine = engine_of(FAMILIES[family](), tokenizer)
    routed: list[torch.Tensor] = []
    for name, module in engine.model.named_modules():
        if name.endswith(("gate", "router")):
            module.register_forward_hook(lambda m, a, out: routed.append(router_choice(out)))
    engine.next_logits([ASK], "naive")
    routed.clear()  # the first request also encoded the chunks
    engine.next_logits([ASK], "naive")
    served = list(routed)
    routed.clear()
    dense_logits(engine, ASK, build("naive"))
    for few, many in zip(served, routed, strict=True):
        assert torch.equal(few, many[-len(few) :])


def router_choice(output) -> torch.Tensor:
    logits = output[0] if isinstance(output, tuple) else output
    return logits.topk(2, dim=-1).indices
