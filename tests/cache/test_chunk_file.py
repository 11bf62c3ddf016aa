"""Writing a chunk file: with other writers, without space, and killed half-way."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cache.made import MODEL, assert_same_chunk
from cache.writers import BUDGET, CHUNK, KEY, LIMIT

from blocktune.cache import ChunkStore
from blocktune.cache.chunk_file import heads_of
from blocktune.cache.folder import WRITING, chunk_path
from blocktune.cache.shelf import Shelf

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
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *(f"{what}={folders[name]}" for what, name in scenarios)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
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
    assert len(store) == 0
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
