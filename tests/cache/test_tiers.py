"""Entries move between tiers: down when there is no room, up when they are used."""

import sqlite3
import threading
import time
from functools import partial
from pathlib import Path

import pytest
from cache.made import MODEL, assert_same_chunk, made_chunk

from blocktune.cache import ChunkStore, chunk_key
from blocktune.cache.store import tiers
from blocktune.cache.store.config import StoreConfig
from blocktune.cache.store.ledger import INDEX, POLICIES

CHUNKS = [made_chunk(5, seed=10 * n) for n in range(6)]
KEYS = [chunk_key(MODEL, kv.token_ids) for kv in CHUNKS]
SIZE = CHUNKS[0].num_bytes


def tier_of(store, index):
    found = store.lookup(KEYS[index], CHUNKS[index].token_ids, MODEL)
    if found.kv is not None:
        assert_same_chunk(found.kv, CHUNKS[index])
    return found.tier


def test_what_leaves_the_device_goes_to_the_host_and_comes_back():
    store = ChunkStore(config=StoreConfig(memory=2 * SIZE, cpu=2 * SIZE))
    for index in range(5):
        store.put(KEYS[index], CHUNKS[index])
    # 3 and 4 are on the device, 1 and 2 on the host, 0 had no room left.
    assert [key in store for key in KEYS[:5]] == [False, True, True, True, True]
    assert (tier_of(store, 1), tier_of(store, 1)) == ("cpu", "memory")
    assert [tier_of(store, n) for n in (4, 1)] == ["memory", "memory"]
    assert tier_of(store, 3) == "cpu"  # it made room for 1
    stats = store.stats()
    assert (len(store.held()), stats.memory_bytes) == (4, 4 * SIZE)
    assert (stats.tiers["memory"].hits, stats.tiers["cpu"].hits) == (3, 2)
    assert stats.tiers["cpu"].bytes_read == 2 * SIZE
    assert tier_of(store, 0) == "none"
    assert store.stats().misses == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_every_tier_keeps_its_budget_under_every_policy(tmp_path, policy):
    probe = ChunkStore(0, tmp_path / "probe")
    probe.put(KEYS[0], CHUNKS[0])
    file = next((tmp_path / "probe").rglob("*.safetensors")).stat().st_size + 100
    config = StoreConfig(
        folder=tmp_path / "store", memory=SIZE, cpu=2 * SIZE, disk=4 * file, policy=policy
    )
    store = ChunkStore(config=config)
    for turn in range(30):
        index = turn * 7 % 6
        if tier_of(store, index) == "none":
            store.put(KEYS[index], CHUNKS[index], seconds=1.0 + index)
        memory, cpu = store._memories
        assert memory.ledger.size() <= SIZE
        assert cpu.ledger.size() <= 2 * SIZE
        assert len(list((tmp_path / "store").rglob("*.safetensors"))) <= 4
        assert memory.entries.keys() == {row.key for row in memory.ledger.rows()}
        assert cpu.entries.keys() == {row.key for row in cpu.ledger.rows()}
    assert store.stats().tiers["disk"].evictions > 0


def test_a_tenant_over_its_quota_loses_only_its_own():
    store = ChunkStore(config=StoreConfig(memory=10 * SIZE, quota=2 * SIZE))
    store.put(KEYS[0], CHUNKS[0], tenant="a")
    for index in (1, 2, 3):
        store.put(KEYS[index], CHUNKS[index], tenant="b")
    assert [key in store for key in KEYS[:4]] == [True, False, True, True]


def test_pinned_entries_stay_in_memory():
    store = ChunkStore(2 * SIZE)
    store.put(KEYS[0], CHUNKS[0])
    assert store.pin(KEYS[0])
    assert not store.pin(KEYS[5])
    for index in (1, 2, 3):
        store.put(KEYS[index], CHUNKS[index])
    assert [key in store for key in KEYS[:4]] == [True, False, False, True]
    store.pin(KEYS[0], False)
    store.put(KEYS[4], CHUNKS[4])
    assert KEYS[0] not in store


def test_a_pin_moves_with_its_entry():
    store = ChunkStore(config=StoreConfig(memory=SIZE, cpu=SIZE))
    for index in (0, 1):
        store.put(KEYS[index], CHUNKS[index])
    assert store.pin(KEYS[0])  # on the host
    assert (tier_of(store, 0), tier_of(store, 0)) == ("cpu", "memory")
    for index in (2, 3, 4):
        store.put(KEYS[index], CHUNKS[index])
    assert store.pinned() == {KEYS[0]: SIZE}
    assert KEYS[0] in store


def test_a_trace_on_a_full_disk_ends_and_the_store_goes_on(caplog):
    store = ChunkStore(config=StoreConfig(trace=Path("/dev/full")))
    for index in (0, 1):
        store.put(KEYS[index], CHUNKS[index])
        assert tier_of(store, index) == "memory"
    [record] = caplog.records
    assert record.getMessage() == "the trace '/dev/full' ends here: No space left on device"


def test_a_trace_may_lie_in_the_folder_that_the_store_makes(tmp_path):
    store = ChunkStore.open(f"{tmp_path}/new,trace={tmp_path}/new/trace.jsonl")
    store.put(KEYS[0], CHUNKS[0])
    assert '"op": "put"' in (tmp_path / "new" / "trace.jsonl").read_text()
    assert KEYS[0] in store


def test_a_busy_index_stops_no_pin(tmp_path):
    store = ChunkStore(folder=tmp_path)
    store.put(KEYS[0], CHUNKS[0])
    other = sqlite3.connect(tmp_path / INDEX, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")  # as a process does while it evicts
    assert store.pin(KEYS[0])  # in memory
    assert store.is_pinned(KEYS[0])
    assert store.pinned() == {KEYS[0]: SIZE}
    other.rollback()
    other.close()


def test_a_busy_index_stops_no_hit(tmp_path, monkeypatch):
    store, free = ChunkStore(folder=tmp_path), []

    def ask():
        free.append(store._lock.acquire(blocking=False))
        if free[-1]:
            store._lock.release()

    def on_ledger(tier, act, default=None):
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()
        return default

    store.put(KEYS[0], CHUNKS[0])
    monkeypatch.setattr(tiers.BlobTier, "on_ledger", on_ledger)
    store.pin(KEYS[0]), store.is_pinned(KEYS[0]), store.pinned(), store.row(KEYS[0])
    assert free == [True] * 4


def test_a_host_without_a_device_counts_uses():
    store = ChunkStore(config=StoreConfig(memory=0, cpu=2 * SIZE, policy="lfu"))
    for index in (0, 1):
        store.put(KEYS[index], CHUNKS[index])
    assert [tier_of(store, index) for index in (0, 0, 0, 1)] == ["cpu"] * 4
    store.put(KEYS[2], CHUNKS[2])
    assert [key in store for key in KEYS[:3]] == [True, False, True]


def test_what_has_expired_takes_no_room_on_the_host(monkeypatch):
    store = ChunkStore(config=StoreConfig(memory=SIZE, cpu=SIZE, ttl=60.0))
    now = [time.time()]
    monkeypatch.setattr(time, "time", lambda: now[0])
    for tier in store._memories:
        monkeypatch.setattr(tier.ledger, "_clock", lambda: now[0])
    for index in (0, 1):
        store.put(KEYS[index], CHUNKS[index])
        now[0] += 20
    assert tier_of(store, 0) == "cpu"  # 1 moves to the host
    now[0] += 21
    store.put(KEYS[2], CHUNKS[2])  # 0 has expired
    assert tier_of(store, 1) == "cpu"


def test_a_lookup_beside_a_removal_keeps_nothing(tmp_path, monkeypatch):
    store, remove = ChunkStore(folder=tmp_path), tiers.BlobTier.remove
    store.put(KEYS[0], CHUNKS[0])

    def remove_late(tier, *keys):
        tier_of(store, 0)  # as another thread may call it
        return remove(tier, *keys)

    monkeypatch.setattr(tiers.BlobTier, "remove", remove_late)
    assert store.discard(KEYS[0])
    assert KEYS[0] not in store


def test_an_index_that_was_busy_at_the_start_is_opened_later(tmp_path, monkeypatch):
    monkeypatch.setattr(tiers, "RETRY_S", 0.0)
    store_of = partial(ChunkStore, config=StoreConfig(folder=tmp_path, memory=0, disk=10**6))
    store_of().put(KEYS[0], CHUNKS[0])
    other = sqlite3.connect(tmp_path / INDEX, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    store = store_of()
    other.rollback()
    other.close()
    for index in (1, 2):
        store.put(KEYS[index], CHUNKS[index])
    assert [key in store for key in KEYS[:3]] == [True, False, True]
