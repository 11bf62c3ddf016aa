"""Run as a script by `test_chunk_file.py`: one process a scenario, each writing to a store.

Usage: python writers.py SCENARIO=FOLDER ...; prints each process's exit status, negative for the
signal that ended it. They are forked here, where torch is imported once and has run no threads.
"""

import os
import resource
import signal
import sys
from pathlib import Path

from cache.made import MODEL, made_chunk

from blocktune.cache import ChunkStore, chunk_key
from blocktune.cache.store.config import StoreConfig

CHUNK = made_chunk(4000, shapes=((2, 32),) * 2)
KEY = chunk_key(MODEL, CHUNK.token_ids)
BUDGET = 50_000
LIMIT = 1 << 20  # more than the index takes, less than the chunk


def write_and_read(folder):
    store = ChunkStore(max_bytes=0, folder=folder)
    for _ in range(30):
        store.put(KEY, CHUNK)
        assert store.get(KEY, CHUNK.token_ids, MODEL) is not None
    assert store.stats().rejected == 0


def write_within(folder):
    """More than the folder may hold, while others do the same."""
    store = ChunkStore(config=StoreConfig(folder=Path(folder), memory=0, disk=BUDGET))
    for seed in range(40):
        kv = made_chunk(20, seed=seed * 100 + os.getpid() % 100)
        store.put(chunk_key(MODEL, kv.token_ids), kv)
        store.get(chunk_key(MODEL, kv.token_ids), kv.token_ids, MODEL)
    stats = store.stats()
    assert (stats.files.unwritten, stats.rejected) == (0, 0)


def die_in_the_middle(folder):
    """The kernel kills the process inside `write`, with a part of the file on the disk."""
    store = ChunkStore(max_bytes=0, folder=folder)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    store.put(KEY, CHUNK)


def fill_the_disk(folder):
    """Without the signal the same limit is what a full disk is: an error from `write`."""
    store = ChunkStore(max_bytes=0, folder=folder, must_write=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT, LIMIT))
    try:
        store.put(KEY, CHUNK)
    except ValueError as error:
        Path(folder, "error.txt").write_text(str(error))


def fork(scenario, folder):
    child = os.fork()
    if not child:
        globals()[scenario](folder)
        sys.stdout.flush()
        os._exit(0)
    return child


if __name__ == "__main__":
    children = [fork(*argument.split("=", 1)) for argument in sys.argv[1:]]
    print(*(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children))
