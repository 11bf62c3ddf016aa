"""One entry in one safetensors file: written whole or not at all, verified when read."""

from __future__ import annotations

import hashlib
import json
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from blocktune.cache.chunk_kv import Entry
from blocktune.cache.fingerprint import CACHE_FORMAT
from blocktune.files import replacing

FORMAT = f"blocktune chunk {CACHE_FORMAT}"
WRITING = ".writing"
"""Folder inside a store for unfinished files: the same file system, so renaming is atomic."""
_ABANDONED_S = 3600
_KEY = re.compile(r"[0-9a-f]{64}")

AnyEntry = TypeVar("AnyEntry", bound=Entry)


class ChunkFile(Generic[AnyEntry]):
    """An open file of a store. Header and token ids are verified at once, tensors when read."""

    def __init__(self, folder: Path, key: str, kind: type[AnyEntry]):
        """Opens the entry of ``key``.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the file is not what `write_chunk` wrote under this key; says why.
        """
        self.kind = kind
        with _readable():
            self._file = safe_open(chunk_path(folder, key), framework="pt")
            self._header = dict(self._file.metadata() or {})
            checksum = self._header.pop("checksum", None)
            self._sums = json.loads(self._header["checksums"])
            named = (self._header["format"], self._header["kind"], self._header["key"])
        if named != (FORMAT, kind.kind, key):
            raise ValueError("its header names another chunk or cache format")
        if checksum != _digest(self._header):
            raise ValueError("its header does not match its checksum")
        self.token_ids = self.read("token_ids")

    @property
    def fingerprint(self) -> str:
        """Of the model that made it."""
        return self._header["fingerprint"]

    def fact(self, name: str) -> int:
        """A number of the header."""
        return int(self._header[name])

    def read(self, name: str) -> Tensor:
        """One tensor, verified, in memory of its own.

        Raises:
            ValueError: If it is not what was written.
        """
        with _readable():
            # A copy: the mapped file may change after it was verified.
            tensor = self._file.get_tensor(name).clone()
        if self._sums.get(name) != _checksum(name, tensor):
            raise ValueError(f"'{name}' does not match its checksum")
        return tensor

    def entry(self) -> AnyEntry:
        """All of it, verified, on the CPU."""
        return self.kind.restore(self._header, self.read, self.token_ids, self.fingerprint)


def read_chunk(folder: Path, key: str, kind: type[AnyEntry]) -> AnyEntry:
    """Reads one entry; raises as `ChunkFile` does."""
    return ChunkFile(folder, key, kind).entry()


def chunk_path(folder: Path, key: str) -> Path:
    """Where a chunk is stored: two levels of folders keep each of them short.

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

    Several processes may write the same key at once: the last one stays.

    Returns:
        Bytes written.

    Raises:
        ValueError: If the disk refuses; nothing is left behind.
    """
    entry = entry.to("cpu").compact()
    tensors = dict(entry.tensors()) | {"token_ids": entry.token_ids}
    data = save(tensors, metadata=_metadata(key, entry, tensors))
    try:
        with replacing(chunk_path(folder, key), staging=folder / WRITING) as unfinished:
            unfinished.write_bytes(data)
    except OSError as error:
        raise ValueError(
            f"cannot write chunk {key[:12]} to '{folder}': {error.strerror or error}; "
            "free space there or choose another store"
        ) from None
    return len(data)


@contextmanager
def _readable() -> Iterator[None]:
    """One kind of error for whatever a damaged file makes the libraries raise."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"unreadable ({error})") from None


def _metadata(key: str, entry: Entry, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The file's header: what the entry is, and checksums of each tensor and of the header."""
    sums = {name: _checksum(name, tensor) for name, tensor in tensors.items()}
    header = {
        "format": FORMAT,
        "kind": entry.kind,
        "key": key,
        "fingerprint": entry.fingerprint,
        "num_bytes": str(entry.num_bytes),
        "checksums": json.dumps(sums, sort_keys=True),
    } | {name: str(fact) for name, fact in entry.facts().items()}
    return header | {"checksum": _digest(header)}


def _digest(header: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _checksum(name: str, tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.numel():  # an empty tensor has no buffer to view
        digest.update(memoryview(tensor.view(torch.uint8).numpy()).cast("B"))
    return digest.hexdigest()
