"""The store: tiers, eviction, and what it must never hand out."""

import logging
import os
import pickle
import threading

import pytest
import torch
from cache.made import MODEL, OTHER_MODEL, assert_same_chunk, made_chunk

from blocktune.cache import ChunkStore, chunk_key
from blocktune.cache.store.config import StoreConfig
from blocktune.cache.store.folder import chunk_path

IDS = range(5)
KEY = chunk_key(MODEL, IDS)
CHUNK = made_chunk(5)


def keys_of(chunks):
    return [chunk_key(MODEL, kv.token_ids) for kv in chunks]


def test_a_store_that_is_pickled_says_what_to_do():
    with pytest.raises(ValueError, match="cannot be pickled; open it in each process"):
        pickle.dumps(ChunkStore())


def test_memory_hit_and_miss_are_counted():
    store = ChunkStore()
    assert store.lookup(KEY, IDS, MODEL)[:3] == (None, "none", 0)
    store.put(KEY, CHUNK)
    found = store.lookup(KEY, IDS, MODEL)
    assert (found.tier, found.bytes_read, found.load_s) == ("memory", CHUNK.num_bytes, 0.0)
    assert found.lookup_s > 0
    assert_same_chunk(found.kv, CHUNK)
    stats = store.stats()
    memory = stats.tiers["memory"]
    assert (memory.hits, stats.files.hits, stats.misses, stats.rejected) == (1, 0, 1, 0)
    assert (memory.bytes_read, stats.memory_bytes) == (CHUNK.num_bytes, CHUNK.num_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_folder_gives_every_bit_back_to_another_store(tmp_path, dtype):
    chunk = made_chunk(5, dtype=dtype, origin=3)
    chunk.keys[0][0, 0] = torch.tensor([float("inf"), -0.0, 1e-7, -3.14159]).to(dtype)
    ChunkStore(folder=tmp_path).put(KEY, chunk)
    store = ChunkStore(folder=tmp_path)
    found = store.lookup(KEY, IDS, MODEL)
    assert (found.tier, found.bytes_read) == ("disk", chunk.num_bytes)
    assert found.load_s > 0
    assert_same_chunk(found.kv, chunk)
    assert torch.signbit(found.kv.keys[0][0, 0, 1])
    assert store.lookup(KEY, IDS, MODEL).tier == "memory"  # promoted
    stats = store.stats()
    assert (stats.files.hits, stats.tiers["memory"].hits, stats.misses) == (1, 1, 0)
    assert stats.tiers["disk"].bytes_read == chunk.num_bytes


def test_the_least_recently_used_chunk_leaves_first():
    chunks = [made_chunk(5, seed=seed) for seed in range(4)]
    keys = keys_of(chunks)
    store = ChunkStore(max_bytes=3 * chunks[0].num_bytes)
    for key, kv in zip(keys[:3], chunks, strict=False):
        store.put(key, kv)
    assert store.get(keys[0], chunks[0].token_ids, MODEL) is not None  # now 1 is the oldest
    store.put(keys[3], chunks[3])
    assert [key in store for key in keys] == [True, False, True, True]
    assert (len(store.held()), store.stats().tiers["memory"].evictions) == (3, 1)
    assert store.stats().memory_bytes == 3 * chunks[0].num_bytes


def test_putting_a_key_again_replaces_and_is_counted_once():
    store, newer = ChunkStore(), made_chunk(5, origin=2)
    store.put(KEY, CHUNK)
    store.put(KEY, newer)
    assert_same_chunk(store.get(KEY, IDS, MODEL), newer)
    assert (len(store.held()), store.stats().memory_bytes) == (1, newer.num_bytes)


def test_evicted_chunks_are_read_again_from_the_folder(tmp_path):
    chunks = [made_chunk(5, seed=seed) for seed in range(3)]
    store = ChunkStore(max_bytes=chunks[0].num_bytes, folder=tmp_path)
    for key, kv in zip(keys_of(chunks), chunks, strict=True):
        store.put(key, kv)
    assert all(key in store for key in keys_of(chunks))
    for key, kv in zip(keys_of(chunks), chunks, strict=True):
        assert_same_chunk(store.get(key, kv.token_ids, MODEL), kv)
    assert len(store.held()) == 1


def test_a_chunk_larger_than_memory_lives_in_the_folder_or_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"5 tokens takes 600 bytes.*may hold 599"):
        ChunkStore(max_bytes=599).put(KEY, CHUNK)
    for max_bytes in (0, 599):
        store = ChunkStore(max_bytes=max_bytes, folder=tmp_path)
        store.put(KEY, CHUNK)
        assert store.lookup(KEY, IDS, MODEL).tier == "disk"
        assert (store.stats().memory_bytes, store.stats().tiers["memory"].evictions) == (0, 0)


def test_a_large_chunk_does_not_empty_the_memory(tmp_path):
    small, large = made_chunk(5), made_chunk(50, seed=9)
    store = ChunkStore(max_bytes=small.num_bytes, folder=tmp_path)
    store.put(KEY, small)
    store.put(chunk_key(MODEL, large.token_ids), large)
    assert store.lookup(KEY, IDS, MODEL).tier == "memory"


@pytest.mark.parametrize("tier", ["memory", "disk"])
@pytest.mark.parametrize(
    ("ids", "model", "what"),
    [((0, 1, 2, 3, 5), MODEL, "tokens"), ((0, 1), MODEL, "tokens"), (IDS, OTHER_MODEL, "model")],
)
def test_other_tokens_or_another_model_never_hit(tmp_path, caplog, tier, ids, model, what):
    store = ChunkStore() if tier == "memory" else ChunkStore(max_bytes=0, folder=tmp_path)
    store.put(KEY, CHUNK)
    with caplog.at_level(logging.WARNING):
        assert store.get(KEY, ids, model) is None
    assert (store.stats().rejected, store.stats().misses) == (1, 1)
    [record] = caplog.records
    assert f"it holds other {what} than wanted" in record.getMessage()


def test_a_file_under_another_key_is_not_used(tmp_path):
    store = ChunkStore(max_bytes=0, folder=tmp_path)
    store.put(KEY, CHUNK)
    # The same tokens and model, encoded otherwise: only the key tells.
    other = chunk_key(MODEL, IDS, {"num_blanks": 2})
    chunk_path(tmp_path, other).parent.mkdir(parents=True)
    os.rename(chunk_path(tmp_path, KEY), chunk_path(tmp_path, other))
    assert store.get(other, IDS, MODEL) is None
    assert store.stats().rejected == 1


def test_a_flipped_bit_anywhere_is_never_used(tmp_path, caplog):
    kv = made_chunk(2, shapes=((1, 2),))
    key = chunk_key(MODEL, kv.token_ids)
    store = ChunkStore(max_bytes=0, folder=tmp_path)
    store.put(key, kv)
    path = chunk_path(tmp_path, key)
    sound = path.read_bytes()
    for index in range(len(sound)):
        damaged = bytearray(sound)
        damaged[index] ^= 1 << (index % 8)
        path.write_bytes(damaged)
        assert store.get(key, kv.token_ids, MODEL) is None, f"byte {index} of {len(sound)}"
    assert store.stats().rejected == len(sound)
    [record] = caplog.records  # however many there are
    assert "\n" not in record.getMessage()


def test_a_truncated_file_is_reported_once_then_written_anew(tmp_path, caplog):
    store = ChunkStore(max_bytes=0, folder=tmp_path)
    store.put(KEY, CHUNK)
    path = chunk_path(tmp_path, KEY)
    sound = path.read_bytes()
    with caplog.at_level(logging.INFO):
        for size in (0, 4, 8, 100, len(sound) // 2, len(sound) - 1):
            path.write_bytes(sound[:size])
            assert store.get(KEY, IDS, MODEL) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"] + 5 * ["INFO"]
    for record in caplog.records:
        assert f"it is encoded again: {path}" in record.getMessage()
        assert "cut off" in record.getMessage()
    assert (store.stats().rejected, str(path) in store.stats().first_rejected) == (6, True)
    store.put(KEY, CHUNK)
    assert_same_chunk(store.get(KEY, IDS, MODEL), CHUNK)


def test_damage_after_reading_does_not_reach_what_was_read(tmp_path):
    ChunkStore(folder=tmp_path).put(KEY, CHUNK)
    store = ChunkStore(folder=tmp_path)
    kv = store.get(KEY, IDS, MODEL)
    path = chunk_path(tmp_path, KEY)
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert_same_chunk(kv, CHUNK)
    assert_same_chunk(store.get(KEY, IDS, MODEL), CHUNK)


def test_views_of_a_batch_are_stored_without_the_batch(tmp_path):
    batch = torch.randn(2, 50, 4)
    kv = made_chunk(5, shapes=((2, 4),), keys=(batch[:, 3:8],), values=(batch[:, 9:14],))
    store = ChunkStore(folder=tmp_path)
    store.put(KEY, kv)
    held = store.get(KEY, IDS, MODEL)
    assert held.keys[0].untyped_storage().nbytes() == held.keys[0].nbytes
    assert_same_chunk(ChunkStore(folder=tmp_path).get(KEY, IDS, MODEL), kv)


def test_a_store_needs_a_place_it_can_use(tmp_path):
    file = tmp_path / "file"
    file.write_text("not a folder")
    for folder in (file, file / "inside"):
        with pytest.raises(ValueError, match=r"cannot use .*file.* as a chunk store: ") as error:
            ChunkStore(folder=folder)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="needs memory or a folder; got 0 bytes, folder None"):
        ChunkStore(max_bytes=0)
    for name in ("memory", "cpu", "disk", "remote_bytes", "quota"):
        with pytest.raises(ValueError, match=f"{name} is a number of bytes.*got -1"):
            StoreConfig(**{"folder": tmp_path, name: -1})
    assert file.read_text() == "not a folder"


@pytest.mark.parametrize("key", ["../../etc/passwd", "ABC", "a" * 63])
def test_only_keys_made_by_chunk_key_name_files(tmp_path, key):
    with pytest.raises(ValueError, match="64 hex digits"):
        ChunkStore(folder=tmp_path).put(key, CHUNK)


def test_threads_share_one_store(tmp_path):
    chunks = [made_chunk(5, seed=seed) for seed in range(8)]
    keys = keys_of(chunks)
    store = ChunkStore(max_bytes=3 * chunks[0].num_bytes, folder=tmp_path)
    failures = []

    def work(offset):
        try:
            for step in range(40):
                index = (step * 3 + offset) % 8
                kv = store.get(keys[index], chunks[index].token_ids, MODEL)
                if kv is None:
                    store.put(keys[index], chunks[index])
                else:
                    assert_same_chunk(kv, chunks[index])
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    stats = store.stats()
    assert stats.tiers["memory"].hits + stats.files.hits + stats.misses == 6 * 40
    assert (stats.rejected, len(store.held())) == (0, 3)
    assert stats.memory_bytes == 3 * chunks[0].num_bytes


def test_a_process_that_changes_its_folder_keeps_its_store(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = ChunkStore(0, "chunks")
    store.put(KEY, CHUNK)
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert store.get(KEY, CHUNK.token_ids, MODEL) is not None
    store.discard(KEY)
    store.put(KEY, CHUNK)
    assert len(list((tmp_path / "chunks").rglob("*.safetensors"))) == 1
