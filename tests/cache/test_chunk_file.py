"""Writing a chunk file: with other writers, without space, and killed half-way."""

import json
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import forked
import pytest
import torch
from cache.made import MODEL, assert_same_chunk
from cache.writers import BUDGET, CHUNK, KEY, LIMIT
from safetensors.torch import load_file

from blocktune.cache import ChunkKV, ChunkStore
from blocktune.cache.store import chunk_file
from blocktune.cache.store.chunk_file import ChunkFile, FileKV, heads_of
from blocktune.cache.store.config import CODECS, StoreConfig
from blocktune.cache.store.folder import WRITING, ChunkFolder, OpenFile, chunk_path
from blocktune.cache.store.shelf import Shelf
from blocktune.positions import LayerRope, RopeSpec

SCRIPT = Path(__file__).with_name("writers.py")


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """Folders after the writers of `writers.py` ended, how they did, and what had been there."""
    folders = {
        name: tmp_path_factory.mktemp(name) for name in ("shared", "new", "old", "full", "bounded")
    }
    ChunkStore(folder=folders["old"]).put(KEY, CHUNK)
    before = chunk_path(folders["old"], KEY).read_bytes()
    scenarios = [
        ("write_and_read", "shared"),
        ("write_and_read", "shared"),
        ("die_in_the_middle", "new"),
        ("die_in_the_middle", "old"),
        ("fill_the_disk", "full"),
        ("write_within", "bounded"),
        ("write_within", "bounded"),
    ]
    done = forked.run([SCRIPT, *(f"{what}={folders[name]}" for what, name in scenarios)])
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    status = [int(word) for word in done.stdout.split()]
    return SimpleNamespace(**folders, status=status, before=before)


def test_two_processes_write_and_read_one_key(ended):
    assert ended.status[:2] == [0, 0]
    store = ChunkStore(folder=ended.shared)
    assert_same_chunk(store.get(KEY, CHUNK.token_ids, MODEL), CHUNK)
    assert len(list(ended.shared.rglob("*.safetensors"))) == 1
    assert list((ended.shared / WRITING).iterdir()) == []


def test_a_writer_killed_in_the_middle_leaves_no_chunk(ended):
    assert ended.status[2] == -signal.SIGXFSZ
    [half] = (ended.new / WRITING).iterdir()
    assert half.stat().st_size == LIMIT  # it was in the middle
    store = ChunkStore(folder=ended.new)
    assert not half.exists()
    assert KEY not in store
    assert not list(ChunkFolder(ended.new).listing())
    assert store.get(KEY, CHUNK.token_ids, MODEL) is None
    assert (store.stats().misses, store.stats().rejected) == (1, 0)


def test_a_writer_killed_over_an_older_file_leaves_that(ended):
    assert ended.status[3] == -signal.SIGXFSZ
    assert chunk_path(ended.old, KEY).read_bytes() == ended.before


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(ended):
    assert ended.status[4:] == [0, 0, 0]
    message = (ended.full / "error.txt").read_text()
    assert re.fullmatch(r"cannot write to the store '.*': .+; free space there .*", message)
    assert list((ended.full / WRITING).iterdir()) == []
    assert list(ended.full.rglob("*.safetensors")) == []


def test_two_processes_keep_one_budget(ended):
    files = {path.stem: path.stat().st_size for path in ended.bounded.rglob("*.safetensors")}
    assert BUDGET / 2 < sum(files.values()) <= BUDGET
    assert {row.key: row.size for row in Shelf.open(str(ended.bounded)).rows()} == files


def test_ranks_share_out_the_heads():
    states = torch.arange(8)
    assert [states[heads_of(rank, 4, 8)].tolist() for rank in (0, 3)] == [[0, 1], [6, 7]]
    assert [heads_of(rank, 4, 2).start for rank in range(4)] == [0, 0, 1, 1]


def opened(folder, name=KEY):
    return ChunkFile(ChunkFolder(folder), name, ChunkKV)


def test_a_file_is_verified_once_for_each_state_and_process(tmp_path, monkeypatch):
    ChunkStore(0, tmp_path).put(KEY, CHUNK)
    real, names = chunk_file._checksum, []
    monkeypatch.setattr(chunk_file, "_checksum", lambda *args: names.append(args[1]) or real(*args))
    monkeypatch.setattr(chunk_file, "SETTLED_S", -1.0)
    assert_same_chunk(opened(tmp_path).entry(), CHUNK)
    assert len(names) == 5
    assert_same_chunk(opened(tmp_path).entry(), CHUNK)
    FileKV.read(opened(tmp_path))
    assert len(names) == 5
    opened(tmp_path).verify()  # whoever asks for it gets it
    assert len(names) == 10
    path = chunk_path(tmp_path, KEY)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="does not match its checksum"):
        FileKV.read(opened(tmp_path))


def test_a_file_that_just_changed_is_verified_each_time(tmp_path, monkeypatch):
    ChunkStore(0, tmp_path).put(KEY, CHUNK)
    path, status = chunk_path(tmp_path, KEY), os.stat(chunk_path(tmp_path, KEY))
    assert_same_chunk(opened(tmp_path).entry(), CHUNK)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    # The clock of a file system is coarse: the date may be the same.
    identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
    monkeypatch.setattr(OpenFile, "identity", property(lambda _: identity), raising=False)
    monkeypatch.setattr(OpenFile, "__setattr__", _but_identity)
    with pytest.raises(ValueError, match="does not match its checksum"):
        opened(tmp_path).entry()


def _but_identity(self, name, value):
    if name != "identity":
        object.__setattr__(self, name, value)


@pytest.mark.parametrize("codec", CODECS)
def test_layers_are_read_from_a_file_as_they_are_in_memory(tmp_path, codec):
    rope = RopeSpec((LayerRope(torch.linspace(1, 0.1, 16)),) * 2)
    store = ChunkStore(config=StoreConfig(folder=tmp_path, memory=0, codec=codec))
    store.write_manifest(MODEL, lambda: {"fingerprint": MODEL}, rope)
    whole = store.put(KEY, CHUNK)
    found = store.lookup(KEY, CHUNK.token_ids, MODEL, read=FileKV.read)
    assert found.bytes_read == found.kv.num_bytes == whole.num_bytes
    if codec != "as-is":
        assert_same_chunk(found.kv, whole)
    else:
        assert [(k.shape, k.is_meta) for k in found.kv.keys] == [
            (k.shape, True) for k in CHUNK.keys
        ]
        room = torch.zeros(2, 5000, 32)
        parts = {name: torch.zeros(2, 4000, 32) for name in ("value.0", "key.1", "key.0")}
        for name, out in (parts | {"value.1": room[:, 500:4500]}).items():
            found.kv.file.read_into(name, out)
        assert torch.equal(parts["value.0"], CHUNK.values[0])
        assert all(torch.equal(parts[f"key.{layer}"], CHUNK.keys[layer]) for layer in range(2))
        assert torch.equal(room[:, 500:4500], CHUNK.values[1])
        assert not room[:, :500].any()
        with pytest.raises(ValueError, match="another size"):
            found.kv.file.read_into("value.1", room)


@pytest.mark.parametrize("num_tokens", [1, 7, 512])
def test_keys_begin_on_a_page_of_the_file(tmp_path, num_tokens):
    pairs = [tuple(torch.ones(2, num_tokens, 32) for _ in range(2)) for _ in ("keys", "values")]
    kv = ChunkKV(*pairs, torch.arange(num_tokens), MODEL)
    ChunkStore(0, tmp_path).put(KEY, kv)
    data = chunk_path(tmp_path, KEY).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert (start + json.loads(data[8:start])["key.0"]["data_offsets"][0]) % 4096 == 0
    assert load_file(chunk_path(tmp_path, KEY)).keys() == dict(kv.tensors()).keys() | {"token_ids"}
