"""Chunks from earlier full prompts: the dense oracle holds them, and statistics are learnt."""

import dataclasses

import pytest
import torch
from engine.served import ASK, dense_logits, engine_of, served_spans
from families import FAMILIES, build
from tiny_tokenizer import build_tokenizer

from blocktune.cache import ChunkStore
from blocktune.engine import Engine
from blocktune.extras.cache_craft.variants import VariantStore
from blocktune.layout import Kind
from blocktune.methods import build as method_of
from blocktune.prompt import Chunk

TOLERANCE = {"rtol": 0, "atol": 1e-4}
CRAFT = method_of("cache-craft", focus=1.0)
TURNED = dataclasses.replace(ASK, chunks=(ASK.chunks[2], ASK.chunks[0], ASK.chunks[1]))


@pytest.fixture
def engine(tokenizer):
    return engine_of(FAMILIES["llama"](), tokenizer)


def serve(engine, ask, method=CRAFT):
    return engine.answer([ask], method, max_new_tokens=1)[0].usage


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chunk_of_an_earlier_prompt_matches_the_dense_oracle_with_blank_rows(family, tokenizer):
    config = FAMILIES[family]()
    if family == "mistral":
        config.sliding_window = 40
    engine = engine_of(config, tokenizer)
    serve(engine, ASK)
    prompt = engine.lay_out(engine.prompts.pieces(TURNED, CRAFT), CRAFT)
    assert (prompt.layout.kind == Kind.BLANK).any()
    for method in (CRAFT, method_of("cache-craft", focus=0.5, hold=0.5)):
        served, spans = served_spans(engine, TURNED, method)
        assert 0 < len(spans) < int(prompt.layout.is_context.sum())
        wanted = dense_logits(engine, TURNED, method, spans)
        torch.testing.assert_close(served, wanted, **TOLERANCE)
    # One layer's fresh rows alone change nothing: what layer 0 stores knows no context.
    served, spans = served_spans(engine, TURNED, CRAFT)
    moved = (served - dense_logits(engine, TURNED, CRAFT, spans[: len(spans) // 2])).abs().max()
    assert moved > 10 * TOLERANCE["atol"]


def test_the_first_prompt_is_a_full_prefill_and_the_same_prompt_again_needs_nothing(engine):
    full = engine.next_logits([ASK], "full-prefill")
    torch.testing.assert_close(engine.next_logits([ASK], CRAFT), full, rtol=0, atol=1e-5)
    first, second = serve(engine, ASK), serve(engine, ASK)
    assert first.recompute_ratio == 1
    assert (second.recompute_ratio, second.chunk_hits) == (0, 3)
    torch.testing.assert_close(engine.next_logits([ASK], CRAFT), full, **TOLERANCE)


def test_a_variant_that_left_the_store_is_encoded_again_after_its_blanks(engine):
    serve(engine, ASK)
    kept = engine.next_logits([TURNED], CRAFT)
    for key, entry in engine.store.held().items():
        if entry.kind == "chunk":
            engine.store.discard(key)
    run = engine.prefilled([TURNED], CRAFT)
    assert run.assembled.misses == [3]
    torch.testing.assert_close(run.prefill.logits, kept, **TOLERANCE)
    variants = VariantStore.of(engine.store, engine.fingerprint)
    assert variants.best(engine.prompts.pieces(ASK, CRAFT).chunks[0], ()) is not None


def test_a_full_prompt_and_a_recalled_one_share_a_batch(engine):
    serve(engine, ASK)
    new = dataclasses.replace(ASK, chunks=(dataclasses.replace(ASK.chunks[0], text="New."),))
    alone = torch.cat([engine.next_logits([ask], CRAFT) for ask in (TURNED, new)])
    together = engine.next_logits([TURNED, new], CRAFT)
    torch.testing.assert_close(together, alone, **TOLERANCE)
    full = engine.next_logits([new], "full-prefill")
    torch.testing.assert_close(together[1:], full, **TOLERANCE)


@pytest.mark.parametrize("focus", [0.5, 1.0])
def test_a_prompt_computed_in_full_is_never_cut_short(engine, focus):
    method = method_of("cache-craft", focus=focus, hold=0.0)
    full = engine.next_logits([ASK], "full-prefill")
    torch.testing.assert_close(engine.next_logits([ASK], method), full, rtol=0, atol=1e-5)


def test_chunks_that_the_question_passes_over_are_given_up(engine):
    serve(engine, ASK)
    every, none = (
        engine.prefilled([TURNED], method_of("cache-craft", focus=0.5, hold=hold)).prefill
        for hold in (1.0, 0.0)
    )
    start, end = (prefill.layer_tokens(2)[0].tolist() for prefill in (every, none))
    assert start[0] == start[1] == end[0] > 0
    assert end[1] == 0


def test_statistics_match_attention_weights_of_a_stock_forward(engine):
    serve(engine, ASK)
    pieces = engine.prompts.pieces(ASK, CRAFT)
    variants = VariantStore.of(engine.store, engine.fingerprint)
    ids = torch.tensor([pieces.prefix + sum(pieces.chunks, ()) + pieces.query])
    engine.model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = engine.model(ids, use_cache=False, output_attentions=True).attentions
    mean = torch.stack(weights).mean((0, 2))[0]  # layers and heads
    lengths = [len(pieces.prefix), *map(len, pieces.chunks), len(pieces.query)]
    spans = torch.arange(ids.shape[1]).split(lengths)
    for number, chunk in enumerate(pieces.chunks):
        blanks = pieces.prefix + sum(pieces.chunks[:number], ())
        variant = variants.find(chunk, blanks)
        own = mean[spans[number + 1]]
        inter = [own[:, spans[old + 1]].sum() for old in range(number)]
        torch.testing.assert_close(variant.inter, torch.tensor(inter), rtol=1e-4, atol=1e-5)
        before = torch.cat([own[:, spans[old + 1]] for old in range(number)] or [own[:, :0]], 1)
        torch.testing.assert_close(variant.tokens, before.sum(1), rtol=1e-4, atol=1e-5)
        assert variant.intra == pytest.approx(float(own[:, spans[number + 1]].sum()), rel=1e-4)


def test_statistics_outlive_the_process_in_a_folder(tokenizer, tmp_path):
    config = FAMILIES["llama"]()
    config.vocab_size = len(tokenizer)
    engines = [
        Engine(build(config), tokenizer, store=ChunkStore(folder=tmp_path)) for _ in range(2)
    ]
    serve(engines[0], ASK)
    assert serve(engines[1], ASK).recompute_ratio == 0


def test_a_budget_replaces_the_fix_overhead(engine):
    serve(engine, ASK)
    for ratio in (0.0, 0.25, 1.0):
        method = method_of(f"cache-craft + stored-context {ratio:.0%}")
        usage = serve(engine, TURNED, method)
        assert usage.layer_tokens[0] == -(-usage.context_tokens * ratio // 1)


@pytest.mark.parametrize("name", ["cache-craft", "cache-craft + first-k 2"])
def test_a_warmed_up_prompt_finds_its_chunks_in_an_earlier_order(engine, name):
    warmed, plain = (f"cache-craft{word}" + name[11:] for word in (" warm_up=1", ""))
    usage = serve(engine, ASK, method_of(warmed))
    assert usage.chunk_hits == 3
    assert 0 < usage.recompute_ratio < 1
    served = engine.next_logits([ASK], method_of(warmed))
    engine.forget()
    earlier = dataclasses.replace(ASK, chunks=(*ASK.chunks[1:], ASK.chunks[0]))
    assert serve(engine, earlier, method_of(plain)).recompute_ratio == 1
    torch.testing.assert_close(engine.next_logits([ASK], method_of(plain)), served, **TOLERANCE)


def test_a_warmed_up_prompt_shares_its_prefix_with_an_exact_cache(engine):
    cold, warm = (serve(engine, ASK, method_of("prefix-cache", warm_up=n)) for n in (0, 1))
    engine.forget_prefixes()
    assert cold.chunk_hits == warm.chunk_hits - 3 == 0  # the first answer left this very prompt
    usage = serve(engine, ASK, method_of("prefix-cache", warm_up=1))
    assert usage.chunk_hits == 0
    assert usage.bytes_read > 0
    with pytest.raises(ValueError, match="warm_up must be a whole number, at least 0, got -1"):
        method_of("prefix-cache", warm_up=-1)


def test_without_statistics_everything_is_computed(engine):
    usage = serve(engine, ASK, method_of("naive + stored-context"))
    assert usage.layer_tokens[0] > 0
    assert usage.recompute_ratio == pytest.approx(1, abs=0.3)


def test_one_chunk_alone_is_exact():
    engine = engine_of(FAMILIES["llama"](), build_tokenizer(None, bos_token=None))
    one = dataclasses.replace(ASK, chunks=ASK.chunks[:1])
    full = engine.next_logits([one], "full-prefill")
    serve(engine, one)
    torch.testing.assert_close(engine.next_logits([one], CRAFT), full, **TOLERANCE)


def chunks_of(engine, *numbers):
    """An ask over some of five chunks."""
    texts = [chunk.text for chunk in ASK.chunks] + [
        "Kites fly over Lima.",
        "Nobody asked about it.",
    ]
    return dataclasses.replace(ASK, chunks=tuple(Chunk(texts[number]) for number in numbers))


def test_known_chunks_in_a_foreign_context_are_computed_in_full_and_learnt(engine):
    """Online: a corpus whose chunks are all known goes on to be learnt."""
    method = method_of("cache-craft", focus=1.0, refresh=0.2)
    serve(engine, chunks_of(engine, 3, 0), method)
    serve(engine, chunks_of(engine, 1, 4), method)
    mixed = chunks_of(engine, 1, 0, 4)
    never = method_of("cache-craft", focus=1.0, refresh=1.0)
    assert 0.2 < serve(engine, mixed, never).recompute_ratio < 1
    assert serve(engine, mixed, never).recompute_ratio < 1  # and it leaves nothing behind
    assert serve(engine, mixed, method).recompute_ratio == 1
    for how in (method, never):
        assert serve(engine, mixed, how).recompute_ratio == 0


def test_no_more_variants_of_a_chunk_are_kept_than_asked_for(engine):
    def known(variants):
        engine.forget()
        method = method_of("cache-craft", focus=1.0, refresh=0.0, variants=variants)
        for numbers in ((1, 0), (2, 0), (3, 0)):
            serve(engine, chunks_of(engine, *numbers), method)
        return [serve(engine, chunks_of(engine, n, 0), method).recompute_ratio for n in (3, 2, 1)]

    assert known(3) == [0, 0, 0]
    assert known(1) == [0, 1, 1]


def test_a_budget_is_never_broken_by_a_refresh(engine):
    serve(engine, chunks_of(engine, 3, 0))
    serve(engine, chunks_of(engine, 1, 4))
    method = method_of("cache-craft refresh=0.0 + stored-context 25%")
    assert serve(engine, chunks_of(engine, 1, 0, 4), method).recompute_ratio < 0.4
