"""Chunks thinned by kvpress: fewer keys, the positions of the whole, and the right ones kept."""

import dataclasses
import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from engine.served import ASK, FORMAT
from tiny_llama import tiny_llama
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from blocktune.cache import ChunkStore
from blocktune.check.families import _tiny
from blocktune.engine import Engine
from blocktune.layout import Kind
from blocktune.methods import build
from blocktune.methods.press import Press
from blocktune.models.small import small_model
from blocktune.prompt import Chunk
from blocktune.testing import byte_tokenizer


@pytest.fixture(scope="module")
def model(tokenizer):
    return tiny_llama(tokenizer, 512, initializer_range=0.2)


def engine_of(model, tokenizer, text):
    return Engine(model, tokenizer, format=FORMAT, store=ChunkStore.open(text))


def pressed(engine, method="naive", ask=ASK):
    pieces = engine.prompts.pieces(ask, build(method))
    return pieces, engine.start([pieces], method)


def test_fewer_keys_at_the_positions_of_the_whole(model, tokenizer):
    engine = engine_of(model, tokenizer, "press=knorm:0.5")
    pieces, run = pressed(engine)
    kept = [len(chunk) // 2 for chunk in pieces.chunks]
    columns, prefix = run.columns, len(pieces.prefix)
    for index, count in enumerate(kept):
        own = (columns.chunk[0] == index) & (columns.kind[0] == Kind.CHUNK)
        assert int(own.sum()) == count
        start = prefix + sum(map(len, pieces.chunks[:index]))
        assert int(columns.position[0][own].min()) == start
    asked = columns.position[0][columns.kind[0] == Kind.QUERY]
    assert int(asked.min()) == prefix + sum(map(len, pieces.chunks))
    usage = engine.answer([ASK], "naive", max_new_tokens=2)[0].usage
    assert (usage.context_tokens, usage.chunk_hits) == (sum(kept), 3)


def test_the_kept_keys_are_those_that_the_press_scores_highest(model, tokenizer):
    """By Knorm: of each head, the keys with the smallest norms, as they are in the whole chunk."""
    plain, thin = (engine_of(model, tokenizer, t) for t in ("memory=1GB", "press=knorm:0.5"))
    pieces, whole = pressed(plain)
    _, run = pressed(thin)
    prefix, size = len(pieces.prefix), len(pieces.chunks[0])
    for mine, all_of in zip(run.cache.layers, whole.cache.layers, strict=True):
        keys = all_of.keys[0, :, prefix : prefix + size]
        best = (-keys.norm(dim=-1)).topk(size // 2, dim=-1).indices.sort(-1).values
        wanted = keys.gather(1, best[..., None].expand(-1, -1, keys.shape[2]))
        made = mine.keys[0, :, prefix : prefix + size // 2]
        order = made.square().sum((0, 2)).argsort()
        other = wanted.square().sum((0, 2)).argsort()
        torch.testing.assert_close(made[:, order], wanted[:, other], rtol=0, atol=1e-5)


def test_a_ratio_of_nothing_is_plain_reuse(model, tokenizer):
    plain, thin = (engine_of(model, tokenizer, t) for t in ("memory=1GB", "press=knorm:0.0"))
    logits = [engine.next_logits([ASK], "naive") for engine in (plain, thin)]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)
    half = engine_of(model, tokenizer, "press=knorm:0.5").next_logits([ASK], "naive")
    assert (half - logits[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    "press", ["snapkv:0.5", "expectedattention:0.3", "tova:0.5", "keydiff:0.5"]
)
def test_presses_that_read_what_a_layer_sees(model, tokenizer, press):
    long = dataclasses.replace(ASK, chunks=(*ASK.chunks, Chunk("Noel shot it. " * 20)))
    engine = engine_of(model, tokenizer, f"press={press}")
    alone = [engine.answer([ask], "naive", max_new_tokens=4)[0].token_ids for ask in (ASK, long)]
    engine.forget()
    together = engine.answer([long, ASK], "naive", max_new_tokens=4)
    assert [answer.token_ids for answer in together] == alone[::-1]
    usage = together[0].usage
    assert usage.context_tokens < sum(map(len, engine.prompts.pieces(long, build("naive")).chunks))


def test_thinned_chunks_are_written_found_and_kept_apart(model, tokenizer, tmp_path):
    def engine(press: str = ",press=knorm:0.5"):
        return engine_of(model, tokenizer, f"{tmp_path}{press}")

    first = engine()
    first.encode(ASK.chunks)
    answer = first.answer([ASK], "naive", max_new_tokens=2)[0]
    assert (answer.usage.chunk_hits, answer.usage.chunk_misses) == (3, 0)
    again = engine().answer([ASK], "naive", max_new_tokens=2)[0]
    assert (again.usage.chunk_hits, again.token_ids) == (3, answer.token_ids)
    for other in ("", ",press=knorm:0.25"):
        assert engine(other).answer([ASK], "naive", max_new_tokens=1)[0].usage.chunk_misses == 3
    codec = engine(",press=knorm:0.5,codec=int8").answer([ASK], "naive", max_new_tokens=1)[0]
    assert codec.usage.chunk_hits == 3


def test_what_a_press_dropped_does_not_count_against_the_next_chunk(model, tokenizer):
    engine = engine_of(model, tokenizer, "press=knorm:0.5")
    chunks = [Chunk(name + "Noel shot it. " * 80) for name in ("One. ", "Two. ")]
    first, second = engine.prompts.encodable(chunks)[1]
    assert len(first.blanks + second.ids + second.blanks) > engine.prompts.max_tokens
    assert engine.encode(chunks).num_encoded == 2


@pytest.mark.parametrize(
    "method", ["cacheblend", "epic", "query-attention", "cache-craft", "link0", "ape", "sel"]
)
def test_methods_that_need_dropped_tokens_are_refused(model, tokenizer, method):
    engine = engine_of(model, tokenizer, "press=knorm:0.5")
    with pytest.raises(ValueError, match=f"method '{method}' recomputes .*knorm:0.5") as error:
        engine.answer([ASK], method)
    assert "\n" not in str(error.value)
    named = re.search(r"use (.+), or no press", str(error.value))[1]
    for other in ("full-prefill", *re.split(r", | or ", named)):  # what it names is not refused
        assert engine.answer([ASK], other, max_new_tokens=1)


@pytest.mark.parametrize("text", ["knorm", "knorm:1", "knorm:x", "none:0.5", "adakv:0.5"])
def test_no_such_press(text):
    with pytest.raises(ValueError, match=r"a press is NAME:RATIO .* a name of .*knorm") as error:
        Press(text)
    assert text in str(error.value)


def test_a_press_of_unequal_layers_is_refused(model, tokenizer):
    long = dataclasses.replace(ASK, chunks=(Chunk("Noel shot it. " * 30),))
    with pytest.raises(ValueError, match=r"leaves .* keys of .* in one layer and"):
        engine_of(model, tokenizer, "press=pyramidkv:0.5").answer([long], "naive")


def test_a_press_that_lacks_what_it_needs_is_refused_in_one_line(model, tokenizer):
    with pytest.raises(ValueError, match=r"press 'observedattention:0.5' cannot score") as error:
        engine_of(model, tokenizer, "press=observedattention:0.5").answer([ASK], "naive")
    assert "\n" not in str(error.value)


def test_attention_without_the_arguments_of_a_press_is_refused_in_one_line():
    moshi = small_model(*_tiny("moshi"))  # its attention computes the rotation itself
    engine = engine_of(moshi, byte_tokenizer(), "press=knorm:0.5")
    with pytest.raises(ValueError, match="presses need 'position_embeddings', MoshiAttention gets"):
        engine.answer([ASK], "naive")
    assert engine.answer([ASK], "full-prefill", max_new_tokens=1)


@pytest.mark.parametrize("family", ["cohere", "olmo2", "qwen3_moe"])
def test_a_press_by_queries_is_refused_where_kvpress_computes_others(family):
    """Cohere rotates pairs of neighbours; kvpress lacks the norms of the other two."""
    model = small_model(*_tiny(family))
    long = dataclasses.replace(ASK, chunks=(Chunk("Noel shot it. " * 20),))
    with pytest.raises(ValueError, match=r"'snapkv:0.5' scores by queries, .* use .* knorm"):
        engine_of(model, byte_tokenizer(), "press=snapkv:0.5").answer([long], "naive")
    for other in ("knorm", "random"):
        without_queries = engine_of(model, byte_tokenizer(), f"press={other}:0.5")
        assert without_queries.answer([long], "naive", max_new_tokens=1)


def test_importing_kvpress_changes_no_attention_function():
    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    Press("knorm:0.5")
    assert dict(ALL_ATTENTION_FUNCTIONS.items()) == before
    wrapped = [name for name, call in before.items() if "attention_patch" in repr(call)]
    assert not wrapped


def test_threads_over_one_store_with_a_press_do_not_meet(model, tokenizer):
    engine = engine_of(model, tokenizer, "memory=1GB,press=knorm:0.5")
    asks = [dataclasses.replace(ASK, chunks=(Chunk(f"Text {n} of {n * 7}."),)) for n in range(24)]
    with ThreadPoolExecutor(max_workers=3) as pool:
        served = list(pool.map(lambda ask: engine.next_logits([ask], "naive"), asks))
    alone = engine_of(model, tokenizer, "memory=1GB,press=knorm:0.5")
    for ask, logits in zip(asks, served, strict=True):
        torch.testing.assert_close(logits, alone.next_logits([ask], "naive"), rtol=0, atol=1e-5)
