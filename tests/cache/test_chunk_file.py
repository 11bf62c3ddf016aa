"""Writing a chunk file: with other writers, without space, and killed half-way."""

import re
import signal
import subprocess
import sys

import pytest
from cache.made import MODEL, assert_same_chunk, made_chunk

from blocktune.cache import ChunkStore, chunk_key
from blocktune.cache.chunk_file import WRITING, chunk_path

CHUNK = made_chunk(40, shapes=((2, 16),) * 3)
KEY = chunk_key(MODEL, CHUNK.token_ids)

MAKE = """
import resource, signal, sys
from cache.made import MODEL, made_chunk
from blocktune.cache import ChunkStore, chunk_key
kv = made_chunk(40, shapes=((2, 16),) * 3)
key = chunk_key(MODEL, kv.token_ids)
store = ChunkStore(max_bytes=0, folder=sys.argv[1])
"""
PUT_AND_READ = """
for step in range(30):
    store.put(key, kv)
    assert store.get(key, kv.token_ids, MODEL) is not None, step
assert store.stats().rejected == 0
print("done", flush=True)
"""
# The kernel kills the process in the middle of `write`, with 4,096 bytes of the file on disk.
KILLED = """
signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
store.put(key, kv)
"""
# Without the signal the same limit is what a full disk is: an error from `write`.
FULL_DISK = """
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    store.put(key, kv)
except ValueError as error:
    print(error)
"""


def start(code, folder):
    paths = [path for path in sys.path if path]
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path[:0] = {paths!r}\n{MAKE}{code}", folder],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.alone
def test_two_processes_write_and_read_one_key(tmp_path):
    writers = [start(PUT_AND_READ, str(tmp_path)) for _ in range(2)]
    for writer in writers:
        out, err = writer.communicate(timeout=120)
        assert (writer.returncode, out, err) == (0, "done\n", "")
    assert_same_chunk(ChunkStore(folder=tmp_path).get(KEY, CHUNK.token_ids, MODEL), CHUNK)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert list((tmp_path / WRITING).iterdir()) == []


@pytest.mark.alone
def test_a_writer_killed_in_the_middle_leaves_no_chunk(tmp_path):
    writer = start(KILLED, str(tmp_path))
    writer.communicate(timeout=120)
    assert writer.returncode == -signal.SIGXFSZ
    [half] = (tmp_path / WRITING).iterdir()
    assert half.stat().st_size == 4096  # it was in the middle
    store = ChunkStore(folder=tmp_path)
    assert KEY not in store
    assert len(store) == 0
    assert store.get(KEY, CHUNK.token_ids, MODEL) is None
    assert (store.stats().misses, store.stats().rejected) == (1, 0)


@pytest.mark.alone
def test_a_writer_killed_over_an_older_file_leaves_that(tmp_path):
    ChunkStore(folder=tmp_path).put(KEY, CHUNK)
    before = chunk_path(tmp_path, KEY).read_bytes()
    start(KILLED, str(tmp_path)).communicate(timeout=120)
    assert chunk_path(tmp_path, KEY).read_bytes() == before


@pytest.mark.alone
def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path):
    writer = start(FULL_DISK, str(tmp_path))
    out, err = writer.communicate(timeout=120)
    assert (writer.returncode, err) == (0, "")
    assert re.fullmatch(rf"cannot write chunk {KEY[:12]} to '.*': .+; free space there .*\n", out)
    assert list((tmp_path / WRITING).iterdir()) == []
    assert list(tmp_path.rglob("*.safetensors")) == []
