"""Two writers and a reader over one store, killed at random moments.

    PYTHONPATH=.:tests python tests/cache/kill_stress.py --kills 200 --folder out/stress

After every kill each entry is whole or absent, the reader never got a wrong number, and opening the
store leaves no temporary file. The processes are forked from this one, so a round takes
milliseconds.
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch
from cache.made import MODEL, assert_same_chunk, made_chunk

from blocktune.cache import ChunkStore, chunk_key
from blocktune.cache.store.chunk_file import ChunkFile
from blocktune.cache.store.folder import WRITING, ChunkFolder

CHUNKS = [made_chunk(64, seed=seed, shapes=((2, 64),) * 4) for seed in range(8)]
KEYS = [chunk_key(MODEL, kv.token_ids) for kv in CHUNKS]
SECRET = b"stress" * 4


def write(folder: Path, seed: int) -> None:
    draw, store = random.Random(seed), ChunkStore(0, folder, secret=SECRET)
    while True:
        index = draw.randrange(len(KEYS))
        store.put(KEYS[index], CHUNKS[index])
        if draw.random() < 0.2:
            store.discard(KEYS[draw.randrange(len(KEYS))])


def read(folder: Path, seed: int) -> None:
    draw, store = random.Random(seed), ChunkStore(0, folder, secret=SECRET)
    while True:
        index = draw.randrange(len(KEYS))
        kv = store.get(KEYS[index], CHUNKS[index].token_ids, MODEL)
        if kv is not None:
            assert_same_chunk(kv, CHUNKS[index])
        assert store.stats().rejected == 0, store.stats().first_rejected


def forked(work, folder: Path, seed: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        work(folder, seed)
    except BaseException as error:  # the parent reads it from the exit code
        print(f"{work.__name__}: {error!r}", file=sys.stderr, flush=True)
    os._exit(1)


def check(folder: Path) -> tuple[int, int]:
    """Entries that are there, and temporary files that a start removed."""
    left = len(list((folder / WRITING).iterdir()))
    store = ChunkStore(0, folder, secret=SECRET)
    assert list((folder / WRITING).iterdir()) == [], "a temporary file outlived the next start"
    files = ChunkFolder(folder, SECRET)
    there = list(files.keys())
    for key in there:
        ChunkFile(files, key).verify()
    for key, kv in zip(KEYS, CHUNKS, strict=True):
        found = store.get(key, kv.token_ids, MODEL)
        assert (found is not None) == (key in there)
        if found is not None:
            assert_same_chunk(found, kv)
    assert store.stats().rejected == 0, store.stats().first_rejected
    return len(there), left


def stress(folder: Path, kills: int, seed: int = 0) -> dict[str, int]:
    """Kills all three processes ``kills`` times; what was found after that."""
    draw, entries, left = random.Random(seed), 0, 0
    for count in range(kills):
        works = (write, write, read)
        children = [forked(work, folder, draw.randrange(2**32)) for work in works]
        time.sleep(draw.uniform(0.02, 0.25))
        for child in draw.sample(children, 3):
            os.kill(child, signal.SIGKILL)
        for child in children:
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            assert status == -signal.SIGKILL, f"kill {count}: a process failed by itself"
        found = check(folder)
        entries, left = entries + found[0], left + found[1]
    return {"kills": kills, "entries": entries, "temporary_files": left}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="Default: a temporary one.")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        ChunkStore(0, folder)
        print(stress(folder, options.kills, options.seed))
