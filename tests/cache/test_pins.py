"""A pin stays until it is taken away, whatever happens to the entry, its file or the index."""

import errno
import os
import sqlite3
from functools import partial

import pytest
from cache.made import MODEL, made_chunk
from typer.testing import CliRunner

from blocktune.cache import ChunkStore, chunk_key
from blocktune.cache.store import tiers
from blocktune.cache.store.config import StoreConfig
from blocktune.cache.store.ledger import INDEX, Ledger
from blocktune.cache.store.shelf import Shelf
from blocktune.commands import app

CHUNKS = [made_chunk(5, seed=10 * n) for n in range(4)]
KEYS = [chunk_key(MODEL, kv.token_ids) for kv in CHUNKS]
SIZE = CHUNKS[0].num_bytes


@pytest.fixture
def clock(monkeypatch):
    """The time of day, which a test may set."""
    now = [1e9]
    monkeypatch.setattr(tiers.time, "time", lambda: now[0])
    monkeypatch.setitem(Ledger.__init__.__kwdefaults__, "clock", lambda: now[0])
    return now


def store_of(**limits):
    return ChunkStore(config=StoreConfig(**{"memory": 0} | limits))


def found(store, number):
    return store.lookup(KEYS[number], CHUNKS[number].token_ids, MODEL).tier


@pytest.mark.parametrize(
    "where", [{"folder": True}, {"memory": 9 * SIZE}, {"memory": SIZE, "cpu": 9 * SIZE}]
)
def test_an_expired_entry_is_pinned_again_when_it_is_encoded_again(where, clock, tmp_path):
    store = store_of(**where | ({"folder": tmp_path} if "folder" in where else {}), ttl=60.0)
    store.put(KEYS[0], CHUNKS[0])
    assert store.pin(KEYS[0])
    store.put(KEYS[1], CHUNKS[1])  # the first one moves to the host, if there is one
    clock[0] += 61
    assert (found(store, 0), found(store, 1)) == ("none", "none")
    store.put(KEYS[2], CHUNKS[2])  # expired ones make room
    assert store.is_pinned(KEYS[0])
    store.put(KEYS[0], CHUNKS[0])
    assert found(store, 0) != "none"
    assert store.is_pinned(KEYS[0])
    assert store.pinned().keys() == {KEYS[0]}
    assert KEYS[1] not in store


def test_asking_for_one_pin_reads_no_other_row(tmp_path, monkeypatch):
    store = store_of(folder=tmp_path, memory=1 << 20)
    for key, kv in zip(KEYS, CHUNKS, strict=True):
        store.put(key, kv)
    store.pin(KEYS[1])
    monkeypatch.setattr(Ledger, "rows", None)
    assert [store.is_pinned(key) for key in KEYS] == [False, True, False, False]


def test_a_failed_write_over_a_pinned_file_leaves_its_pin(tmp_path, monkeypatch):
    store = store_of(folder=tmp_path)
    store.put(KEYS[0], CHUNKS[0])
    store.pin(KEYS[0])

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    for number in (0, 1):
        store.put(KEYS[number], CHUNKS[number])
    assert store.stats().files.unwritten == 2
    assert store.pinned().keys() == {row.key for row in Shelf.open(str(tmp_path)).rows()}
    assert found(store, 0) == "disk"


@pytest.mark.parametrize("why", ["locked", "full disk"])
def test_gc_keeps_what_is_pinned_if_the_index_cannot_be_written(tmp_path, monkeypatch, why):
    store = store_of(folder=tmp_path)
    for key, kv in zip(KEYS, CHUNKS, strict=True):
        store.put(key, kv)
    store.pin(KEYS[0])
    del store
    other, real = sqlite3.connect(tmp_path / INDEX, isolation_level=None), sqlite3.connect
    if why == "locked":
        other.execute("BEGIN IMMEDIATE")
    else:
        other.close()  # and so is the shared memory that readers of the file need

        def connect(where, **options):
            if str(where) == str(tmp_path / INDEX):
                raise sqlite3.OperationalError("database or disk is full")
            return real(where, **options)

        monkeypatch.setattr(sqlite3, "connect", connect)
    run = partial(CliRunner().invoke, app)
    done = run(["store", "gc", str(tmp_path), "--max-size", "1kB"])
    assert (done.exit_code, done.stdout[:18]) == (0, "removed 3 chunks (")
    assert [path.stem for path in tmp_path.rglob("*.safetensors")] == [KEYS[0]]
    refused = run(["store", "pin", str(tmp_path), KEYS[0]])
    assert refused.exit_code == 2
    assert "has no writable index, where pins are stored" in refused.stderr
    other.close()
