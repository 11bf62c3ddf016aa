"""One entry in one safetensors file: written whole or not at all, verified when read."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from blocktune.cache.chunk_kv import Entry
from blocktune.cache.fingerprint import CACHE_FORMAT
from blocktune.cache.folder import ChunkFolder

FORMAT = f"blocktune chunk {CACHE_FORMAT}"

AnyEntry = TypeVar("AnyEntry", bound=Entry)


class ChunkFile(Generic[AnyEntry]):
    """An open file of a store. Header and token ids are verified at once, tensors when read."""

    def __init__(self, folder: ChunkFolder, key: str, kind: type[AnyEntry] | None = None):
        """Opens the entry of ``key``; without a ``kind`` only `verify` can use it.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the file is not what `write_chunk` wrote under this key, or not signed
                with the folder's key; says why.
        """
        self.kind = kind
        with _readable():
            descriptor = folder.open(key)
            try:  # by its descriptor: the path may become something else meanwhile
                self._file = safe_open(f"/dev/fd/{descriptor}", framework="pt")
            finally:
                os.close(descriptor)
            self._header = dict(self._file.metadata() or {})
            checksum, signature = (self._header.pop(n, None) for n in ("checksum", "signature"))
            self._sums = dict(json.loads(self._header["checksums"]))
            named = (self._header["format"], self._header["kind"], self._header["key"])
        wanted_kind = named[1] if kind is None else kind.kind
        if named != (FORMAT, wanted_kind, key):
            raise ValueError("its header names another chunk or cache format")
        if checksum != _digest(self._header):
            raise ValueError("its header does not match its checksum")
        folder.require_signed(self._header, signature)
        self.token_ids = self.read("token_ids")

    @property
    def fingerprint(self) -> str:
        """Of the model that made it."""
        return self._header["fingerprint"]

    def fact(self, name: str) -> int:
        """A number of the header."""
        with _readable():
            return int(self._header[name])

    def read(self, name: str) -> Tensor:
        """One tensor, verified, in its own memory.

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
        with _readable():
            return self.kind.restore(self._header, self.read, self.token_ids, self.fingerprint)

    def verify(self) -> None:
        """Reads every tensor; raises as `read` does."""
        for name in self._sums:
            self.read(name)


def read_chunk(folder: ChunkFolder, key: str, kind: type[AnyEntry]) -> AnyEntry:
    """Reads one entry; raises as `ChunkFile` does."""
    return ChunkFile(folder, key, kind).entry()


def write_chunk(folder: ChunkFolder, key: str, entry: Entry) -> int:
    """Writes an entry, whole or not at all.

    Returns:
        Bytes written.

    Raises:
        OSError: As `ChunkFolder.write` does.
    """
    entry = entry.to("cpu").compact()
    tensors = dict(entry.tensors()) | {"token_ids": entry.token_ids}
    header = _header(key, entry, tensors)
    signed = {} if folder.secret is None else {"signature": folder.sign(header)}
    data = save(tensors, metadata=header | {"checksum": _digest(header)} | signed)
    folder.write(key, data)
    return len(data)


@contextmanager
def _readable() -> Iterator[None]:
    """One kind of error for whatever a damaged file makes the libraries raise."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"unreadable ({error})") from None


def _header(key: str, entry: Entry, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The file's header: what the entry is, and a checksum of each tensor."""
    sums = {name: _checksum(name, tensor) for name, tensor in tensors.items()}
    return {
        "format": FORMAT,
        "kind": entry.kind,
        "key": key,
        "fingerprint": entry.fingerprint,
        "num_bytes": str(entry.num_bytes),
        "checksums": json.dumps(sums, sort_keys=True),
    } | {name: str(fact) for name, fact in entry.facts().items()}


def _digest(header: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _checksum(name: str, tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.numel():  # an empty tensor has no buffer to view
        digest.update(memoryview(tensor.view(torch.uint8).numpy()).cast("B"))
    return digest.hexdigest()
