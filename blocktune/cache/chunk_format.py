"""What a file of a store holds, and how it is verified: header first, then tensor by tensor."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Generic, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from blocktune.cache.entry import Entry
from blocktune.cache.fingerprint import CACHE_FORMAT

FORMAT = f"blocktune chunk {CACHE_FORMAT}"

AnyEntry = TypeVar("AnyEntry", bound=Entry)


class ChunkFile(Generic[AnyEntry]):
    """An open file of a store. Its header and token ids are verified, the rest when it is read."""

    def __init__(self, file, key: str, kind: type[AnyEntry]):
        """Verifies the header.

        Raises:
            ValueError: If it is not what `write_chunk` wrote under ``key``.
        """
        self._file, self.kind = file, kind
        with readable():
            self._header = dict(file.metadata() or {})
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
        """One tensor, in memory of its own, verified."""
        with readable():
            # Out of the mapping: what is verified must be what is used, whatever happens to the
            # file later.
            tensor = self._file.get_tensor(name).clone()
        if self._sums.get(name) != _checksum(name, tensor):
            raise ValueError(f"'{name}' does not match its checksum")
        return tensor

    def whole(self) -> AnyEntry:
        """All of it."""
        return self.kind.restore(self._header, self.read, self.token_ids, self.fingerprint)


def open_file(path: Path):
    """Opens a file for `ChunkFile`.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no safetensors file.
    """
    with readable():
        return safe_open(path, framework="pt")


@contextmanager
def readable() -> Iterator[None]:
    """One kind of error for whatever a damaged file makes the libraries below raise."""
    try:
        yield
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"unreadable ({error})") from None


def metadata(key: str, entry: Entry) -> dict[str, str]:
    """The file's header: what the entry is, and a checksum of each tensor and of the header."""
    sums = {name: _checksum(name, tensor) for name, tensor in named(entry)}
    header = {
        "format": FORMAT,
        "kind": entry.kind,
        "key": key,
        "fingerprint": entry.fingerprint,
        "num_bytes": str(entry.num_bytes),
        "checksums": json.dumps(sums, sort_keys=True),
    } | {name: str(fact) for name, fact in entry.facts().items()}
    return header | {"checksum": _digest(header)}


def named(entry: Entry) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a file by name."""
    yield from entry.tensors()
    yield "token_ids", entry.token_ids


def _digest(header: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _checksum(name: str, tensor: Tensor) -> str:
    digest = hashlib.sha256(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.numel():  # nothing has no buffer to view
        digest.update(memoryview(tensor.view(torch.uint8).numpy()).cast("B"))
    return digest.hexdigest()
