"""Layers that load while others compute: the same answers, and a choice that adds up."""

import pytest
import torch
from engine.served import ASK, SHORT, engine_of
from families import FAMILIES

from blocktune.cache import ChunkStore
from blocktune.cache.folder import chunk_path
from blocktune.extras.cacheblend_pipelined.loading import LoadingController
from blocktune.methods import build

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def on_disk(tokenizer, folder, family="llama", max_bytes=0):
    """An engine whose chunks lie in a folder, all of them encoded."""
    store = ChunkStore(max_bytes=max_bytes, folder=folder)
    engine = engine_of(FAMILIES[family](), tokenizer, store=store)
    engine.encode([*ASK.chunks, *SHORT.chunks])
    return engine_of(
        FAMILIES[family](), tokenizer, store=ChunkStore(max_bytes=max_bytes, folder=folder)
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_layers_give_the_logits_of_plain_loading(family, tokenizer, tmp_path):
    engine = on_disk(tokenizer, tmp_path, family)
    plain = engine.next_logits([ASK, SHORT], build("cacheblend", ratio=0.25))
    assert engine.store.stats().disk_hits == 6
    streamed = engine.next_logits([ASK, SHORT], build("cacheblend-pipelined", ratio=0.25))
    assert engine.store.stats().disk_hits == 12
    torch.testing.assert_close(streamed, plain, **TOLERANCE)


def test_decoding_goes_on_over_streamed_layers(tokenizer, tmp_path):
    engine = on_disk(tokenizer, tmp_path)
    plain = engine.continued_logits(ASK, build("cacheblend", ratio=0.25), 3)
    ids, logits = engine.continued_logits(ASK, build("cacheblend-pipelined", ratio=0.25), 3)
    assert ids == plain[0]
    torch.testing.assert_close(logits, plain[1], **TOLERANCE)


def test_a_layer_damaged_on_the_disk_is_never_used(tokenizer, tmp_path, caplog):
    engine = on_disk(tokenizer, tmp_path)
    controller = LoadingController.of(engine.store, engine.fingerprint)
    controller.bytes_per_s, controller.row_layer_s = 1e15, 1.0  # the least share, always
    method = build("cacheblend-pipelined", ratio=0.25)
    sound = engine.next_logits([ASK], method)
    encoder = engine._state.encoder
    [piece, *_] = engine.prompts.encodable(ASK.chunks)[1]
    path = chunk_path(tmp_path, encoder.key(piece))
    data = bytearray(path.read_bytes())
    data[-20] ^= 1
    path.write_bytes(data)
    usage = engine.answer([ASK], method, max_new_tokens=1)[0].usage
    assert (usage.chunk_hits, usage.chunk_misses) == (2, 1)
    assert engine.store.stats().rejected == 1
    assert "does not match its checksum" in caplog.text
    torch.testing.assert_close(engine.next_logits([ASK], method), sound, **TOLERANCE)
    assert engine.store.stats().rejected == 1  # it was written anew


def test_another_chunk_under_the_key_is_never_streamed(tokenizer, tmp_path):
    engine = on_disk(tokenizer, tmp_path)
    sound = engine.next_logits([ASK], build("cacheblend", ratio=0.25))
    first, second, _ = engine.prompts.encodable(ASK.chunks)[1]
    encoder = engine._state.encoder
    other = engine.store.get(encoder.key(second), second.ids, engine.fingerprint)
    engine.store.put(encoder.key(first), other)
    run = engine.prefilled([ASK], build("cacheblend-pipelined", ratio=0.25))
    assert (run.assembled.hits, run.assembled.misses) == ([2], [1])
    assert engine.store.stats().rejected == 1
    torch.testing.assert_close(run.prefill.logits, sound, **TOLERANCE)


def test_a_selector_without_a_ratio_is_streamed_all_the_same(tokenizer, tmp_path):
    engine = on_disk(tokenizer, tmp_path)
    plain = engine.next_logits([ASK], "naive + first-k 3")
    run = engine.prefilled([ASK], "cacheblend-pipelined + first-k 3")
    assert run.loading is None
    torch.testing.assert_close(run.prefill.logits, plain, **TOLERANCE)


def test_slow_loading_leaves_time_to_recompute_everything(tokenizer, tmp_path):
    engine = on_disk(tokenizer, tmp_path)
    controller = LoadingController.of(engine.store, engine.fingerprint)
    controller.bytes_per_s, controller.row_layer_s = 1.0, 1e-9
    run = engine.prefilled([ASK], "cacheblend-pipelined")
    assert run.loading.ratio == 1.0
    full = engine.next_logits([ASK], "full-prefill")
    torch.testing.assert_close(run.prefill.logits, full, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("bandwidth", "tier"), [(1e15, "disk"), (1.0, "memory")])
def test_chunks_are_kept_where_loading_them_is_fast_enough(tokenizer, tmp_path, bandwidth, tier):
    engine = on_disk(tokenizer, tmp_path, max_bytes=1 << 20)
    controller = LoadingController.of(engine.store, engine.fingerprint)
    controller.bytes_per_s, controller.row_layer_s = bandwidth, 1.0
    usage = engine.answer([ASK], "cacheblend-pipelined", max_new_tokens=1)[0].usage
    assert (usage.loading.tier, usage.loading.ratio >= 0.15) == (tier, True)
    assert usage.loading.bytes_read == usage.bytes_read
    engine.answer([ASK], "naive", max_new_tokens=1)
    hits = engine.store.stats().memory_hits
    assert hits == (4 if tier == "memory" else 0)


def test_the_choice_by_hand():
    controller = LoadingController()
    assert controller.choose(0.15, 1000, 10, 5000).ratio == 0.15  # nothing measured yet
    controller.saw_computing(10_000, 1.0)  # 0.1 ms a row and layer: 0.1 s for a layer of all rows
    controller.saw_reading(1_000_000, 1.0)
    # 400 kB in 10 layers: 40 ms a layer, in which 40 % of the rows can be recomputed.
    choice = controller.choose(0.15, 1000, 10, 400_000)
    assert choice.ratio == pytest.approx(0.4)
    assert (choice.load_s, choice.recompute_s) == pytest.approx((0.04, 0.04))
    assert choice.tier == "memory"
    assert controller.choose(0.15, 1000, 10, 100_000).tier == "disk"
    assert controller.choose(0.15, 1000, 10, 100_000).ratio == 0.15
    assert controller.choose(0.15, 1000, 10, 10**9).ratio == 1.0
    nothing = controller.choose(0.15, 1000, 10, 0)
    assert (nothing.ratio, nothing.tier, nothing.load_s) == (0.15, "memory", 0.0)


def test_measurements_follow_the_latest():
    controller = LoadingController()
    controller.saw_reading(100, 1.0)
    controller.saw_reading(200, 1.0)
    assert controller.bytes_per_s == pytest.approx(0.8 * 100 + 0.2 * 200)
    controller.saw_reading(0, 1.0)
    controller.saw_computing(0, 0.0)
    assert controller.bytes_per_s == pytest.approx(120)
    assert controller.row_layer_s is None
