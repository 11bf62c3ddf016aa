"""Models with recurrent layers: exact prefixes from checkpoints, and nothing else reused."""

import dataclasses

import pytest
import torch
from engine.served import ASK, FORMAT, SHORT, Ask
from hybrids import HYBRIDS, build_hybrid
from transformers import AutoModelForCausalLM, DynamicCache, MiniMaxConfig

from blocktune.cache import PrefixTree
from blocktune.engine import Engine, recurrent
from blocktune.methods import build
from blocktune.models.recurrent import find_recurrence
from blocktune.prompt import Chunk

TOLERANCE = {"rtol": 0, "atol": 1e-5}


@pytest.fixture(scope="module", params=HYBRIDS)
def engine(request, tokenizer):
    return Engine(build_hybrid(request.param, len(tokenizer)), tokenizer, format=FORMAT)


@pytest.fixture(autouse=True)
def short_prompts_resume(monkeypatch):
    """These prompts are too short for a pass a token to pay (Jamba), and are to be resumed."""
    monkeypatch.setattr(recurrent, "TOKENS_PER_PASS", 0)


def whole(engine, ask):
    """Logits after the prompt by one forward of the stock model, without a cache."""
    pieces = engine.prompts.pieces(ask, build("full-prefill"))
    ids = torch.tensor([[*pieces.context, *pieces.query]])
    with torch.no_grad():
        return engine.model(ids, use_cache=False).logits[:, -1]


def asks():
    """The same context again, another question, a later turn-off, and one within a chunk."""
    other = Ask("What did Noel do?", ASK.chunks)
    turned = Ask("Who?", (*ASK.chunks[:2], Chunk("Another passage.")))
    changed = Chunk("Anna Belt was born in Port Alder and left early.", "Anna Belt")
    within = Ask("Who?", (changed, *ASK.chunks[1:]))
    return ASK, ASK, other, turned, within, within, SHORT


def test_resumed_prompts_equal_an_uncached_run(engine):
    engine.forget_prefixes()
    for ask in asks():
        served = engine.next_logits([ask], "prefix-cache")
        torch.testing.assert_close(served, whole(engine, ask), **TOLERANCE)
        full = engine.next_logits([ask], "full-prefill")
        torch.testing.assert_close(full, whole(engine, ask), **TOLERANCE)
    # And the check can fail: the question after a lost state gives other logits.
    query = torch.tensor([engine.prompts.pieces(ASK, build("full-prefill")).query])
    with torch.no_grad():
        lost = engine.model(query, use_cache=False).logits[:, -1]
    assert (lost - whole(engine, ASK)).abs().max() > 1e-3
    stats = engine.state.prefix_tree.stats()
    assert stats.hit_tokens > stats.missed_tokens
    assert stats.num_states > 0


def test_usage_says_how_deep_a_prompt_was_resumed(engine):
    engine.forget_prefixes()
    context = len(engine.prompts.pieces(ASK, build("prefix-cache")).context)
    first, second = (engine.answer([ASK], "prefix-cache", max_new_tokens=3)[0] for _ in "ab")
    assert (first.usage.prefix_tokens, second.usage.prefix_tokens) == (0, context)
    assert (first.usage.chunk_hits, second.usage.chunk_hits) == (0, 3)
    assert (first.usage.recompute_ratio, second.usage.recompute_ratio) == (1.0, 0.0)
    assert second.usage.bytes_read > 0
    assert 0 < second.usage.flops < first.usage.flops
    assert first.token_ids == second.token_ids
    # Answers to a longer context share what both begin with.
    longer = dataclasses.replace(ASK, chunks=(*ASK.chunks, Chunk("And one more.")))
    assert engine.answer([longer], "prefix-cache")[0].usage.prefix_tokens == context


def test_a_long_rest_is_not_worth_a_pass_a_token(engine, monkeypatch):
    monkeypatch.setattr(recurrent, "TOKENS_PER_PASS", 32)
    engine.forget_prefixes()
    for _ in range(2):
        engine.answer([ASK], "prefix-cache", max_new_tokens=1)
    more = (Chunk(f"Number {number}.") for number in range(40))
    many = dataclasses.replace(ASK, chunks=(*ASK.chunks, *more))
    usage = engine.answer([many], "prefix-cache", max_new_tokens=1)[0].usage
    assert (usage.prefix_tokens > 0) == engine.state.recurrence.several
    served = engine.next_logits([many], "prefix-cache")
    torch.testing.assert_close(served, whole(engine, many), **TOLERANCE)


def test_decoding_goes_on_as_one_forward(engine):
    ids, logits = engine.continued_logits(ASK, "prefix-cache", 4)
    pieces = engine.prompts.pieces(ASK, build("prefix-cache"))
    prompt = torch.tensor([[*pieces.context, *pieces.query, *ids]])
    with torch.no_grad():
        wanted = engine.model(prompt, use_cache=False).logits[:, -1]
    torch.testing.assert_close(logits, wanted, **TOLERANCE)


def test_a_batch_answers_as_single_prompts(engine):
    together = engine.answer([SHORT, ASK], "full-prefill", max_new_tokens=4)
    alone = [engine.answer([a], "full-prefill", max_new_tokens=4)[0] for a in (SHORT, ASK)]
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]
    assert "".join(engine.stream(ASK, "no-context", max_new_tokens=4)) == (
        engine.answer([ASK], "no-context", max_new_tokens=4)[0].text
    )


def test_chunks_are_never_reused(engine):
    refusal = "has recurrent layers, whose state mixes a chunk with all tokens before it; use "
    for method in ("naive", "cacheblend", "epic"):
        with pytest.raises(ValueError, match=f"method '{method}' reuses chunks, .*{refusal}"):
            engine.answer([ASK], method)
    for call in (lambda: engine.encode(["text"]), lambda: engine.cache(["text"], "full-prefill")):
        with pytest.raises(ValueError, match=refusal):
            call()


def test_a_full_tree_still_answers(engine):
    small = PrefixTree(max_bytes=3000)
    tight = Engine(engine.model, engine.tokenizer, format=FORMAT, prefix_tree=small)
    for ask in asks():
        served = tight.next_logits([ask], "prefix-cache")
        torch.testing.assert_close(served, whole(engine, ask), **TOLERANCE)
    assert small.stats().num_bytes <= 3000


def test_mamba_1_goes_on_one_token_at_a_time():
    assert {name: find_recurrence(build_hybrid(name)).several for name in HYBRIDS} == {
        name: name != "jamba" for name in HYBRIDS
    }


def test_a_model_with_a_cache_of_its_own_is_refused():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
    config = MiniMaxConfig(**sizes, num_key_value_heads=2, num_local_experts=2, vocab_size=101)
    with pytest.raises(ValueError, match="MiniMaxForCausalLM does not continue from its own cache"):
        find_recurrence(AutoModelForCausalLM.from_config(config).eval())


def test_a_model_that_forgets_its_state_is_refused(monkeypatch):
    model = build_hybrid("mamba2")
    for kind in ("conv", "recurrent"):
        monkeypatch.setattr(DynamicCache, f"get_{kind}_state", lambda *a, **k: None)
    monkeypatch.setattr(DynamicCache, "update_conv_state", lambda cache, states, *a, **k: states)
    with pytest.raises(ValueError, match="does not continue from its own cache"):
        find_recurrence(model)
