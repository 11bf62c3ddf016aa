"""One entry in one safetensors file: written whole or not at all, verified when read."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import save

from blocktune.cache.chunk_format import AnyEntry, ChunkFile, metadata, named, open_file
from blocktune.cache.entry import Entry

WRITING = ".writing"
"""Folder inside a store for files not finished yet; same file system, so renaming is atomic."""
_ABANDONED_S = 3600
_KEY = re.compile(r"[0-9a-f]{64}")


def chunk_path(folder: Path, key: str) -> Path:
    """Where a chunk lies: two levels of folders, so that none grows beyond what tools can list.

    Raises:
        ValueError: If the key is not one that `chunk_key` makes.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(f"a chunk key is 64 hex digits, see `chunk_key`; got {key!r}")
    return folder / key[:2] / key[2:4] / f"{key}.safetensors"


def open_folder(folder: Path) -> None:
    """Makes the folder of a store, checks that it can be written, removes abandoned writes.

    Raises:
        ValueError: If it cannot be made or written.
    """
    try:
        writing = folder / WRITING
        writing.mkdir(parents=True, exist_ok=True)
        probe = writing / uuid.uuid4().hex
        probe.touch()
        probe.unlink()
        for file in writing.iterdir():
            if time.time() - file.stat().st_mtime > _ABANDONED_S:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot use '{folder}' as a chunk store: {error.strerror or error}; "
            "name a folder that can be written"
        ) from None


def write_chunk(folder: Path, key: str, entry: Entry) -> int:
    """Writes an entry so that readers see the old file, none, or the whole new one.

    Several processes may write the same key at once: each writes a file of its own, the last
    rename stays.

    Returns:
        Bytes written.

    Raises:
        ValueError: If the disk refuses; nothing is left behind.
    """
    path, entry = chunk_path(folder, key), entry.to("cpu").compact()
    unfinished = folder / WRITING / f"{key[:16]}-{os.getpid()}-{uuid.uuid4().hex}"
    data = save(dict(named(entry)), metadata=metadata(key, entry))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ValueError(
            f"cannot write chunk {key[:12]} to '{folder}': {error.strerror or error}; "
            "free space there or choose another store"
        ) from None
    return len(data)


def read_chunk(folder: Path, key: str, kind: type[AnyEntry]) -> AnyEntry:
    """Reads one entry into memory of its own and verifies every bit of it.

    Returns:
        The entry, on the CPU.

    Raises:
        FileNotFoundError: If there is no such entry.
        ValueError: If the file is not what was written under this key; says why.
    """
    with open_chunk(folder, key, kind) as file:
        return file.whole()


@contextmanager
def open_chunk(folder: Path, key: str, kind: type[AnyEntry]) -> Iterator[ChunkFile[AnyEntry]]:
    """Opens an entry's file to read its tensors one by one, each verified when it is read.

    Raises:
        FileNotFoundError: If there is no such entry.
        ValueError: If the file is not what was written under this key; says why.
    """
    with open_file(chunk_path(folder, key)) as file:
        yield ChunkFile(file, key, kind)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
