"""One entry in one safetensors file: written whole or not at all, verified when read."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Generic, TypeVar

import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from blocktune.cache.blobs import MOST_HEADER, Blobs
from blocktune.cache.chunk_kv import Entry
from blocktune.cache.codecs import decoded, encoded
from blocktune.cache.ledger import About
from blocktune.positions import RopeSpec

FORMAT = "blocktune chunk 3"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Of a safetensors header."""
_PROVEN: dict[tuple, None] = {}
"""Files whose SHA-256 sums this process compared; those with a key only."""
_MOST_PROVEN = 1 << 20
NOTHING = About()
Share = tuple[int, int]
"""A tensor parallel rank, and how many there are."""
_BY_HEAD = ("key.", "value.")
"""Tensors whose first axis is heads."""

AnyEntry = TypeVar("AnyEntry", bound=Entry)


class ChunkFile(Generic[AnyEntry]):
    """An open file of a store. Header and token ids are verified at once, tensors when read.

    xxh3 finds damage, at the speed of memory. A store with a key also needs what nobody can forge:
    SHA-256 sums under the key's signature, compared once for each state of a file and process.
    """

    def __init__(self, blobs: Blobs, key: str, kind: type[AnyEntry] | None = None):
        """Opens the entry of ``key``; without a ``kind`` only `verify` can use it.

        Raises:
            FileNotFoundError: If there is none, or its time is over.
            ValueError: If the file is not what `pack_chunk` made for this key, or not signed
                with the store's key; says why.
            OSError: If the place cannot be reached.
        """
        self.kind, self._blob = kind, blobs.open(key)
        with _readable():
            self._tensors = json.loads(self._header_text())
            self._header = dict(self._tensors.pop("__metadata__"))
            checksum, signature = (self._header.pop(n, None) for n in ("checksum", "signature"))
            self._sums = dict(json.loads(self._header["checksums"]))
            self._heads = {} if blobs.secret else json.loads(self._header.get("heads", "{}"))
            self._sha256 = dict(json.loads(self._header.get("sha256", "{}")))
            named = (self._header["format"], self._header["kind"], self._header["key"])
        wanted_kind = named[1] if kind is None else kind.kind
        if named != (FORMAT, wanted_kind, key):
            raise ValueError("its header names another chunk or cache format")
        if checksum != _digest(self._header):
            raise ValueError("its header does not match its checksum")
        blobs.require_signed(self._header, signature)
        if 0 < float(self._header.get("expires", 0)) <= time.time():
            raise FileNotFoundError(key)
        self._file = (key, self._blob.identity)
        self._prove = blobs.secret is not None
        self.token_ids = self.read("token_ids")

    @property
    def fingerprint(self) -> str:
        """Of the model that made it."""
        return self._header["fingerprint"]

    def fact(self, name: str) -> int:
        """A number of the header."""
        with _readable():
            return int(self._header[name])

    def read(self, name: str, share: Share | None = None) -> Tensor:
        """One tensor, or a rank's heads of it, verified, in its own memory.

        Raises:
            ValueError: If it is not what was written.
        """
        with _readable():
            told = self._tensors[name]
            start, end = told["data_offsets"]
            shape, dtype = told["shape"], DTYPES[told["dtype"]]
            if not 0 <= start <= end <= self._blob.size - self._start:
                raise ValueError("it is cut off")
            share = share if name.startswith(_BY_HEAD) else None
            rows = slice(0, None) if share is None else heads_of(*share, shape[0])
            by_head = share is not None and name in self._heads
            if by_head:
                row = (end - start) // shape[0]
                start, end = start + rows.start * row, start + rows.stop * row
                shape = [rows.stop - rows.start, *shape[1:]]
            raw = torch.empty(end - start, dtype=torch.uint8)
            if raw.numel():
                done = self._blob.read_into(memoryview(raw.numpy()), self._start + start)
                if done != raw.numel():
                    raise ValueError("it is cut off")
            tensor = raw.view(dtype).view(shape)
            if by_head:
                if _head_sums(tensor) != self._heads[name][16 * rows.start : 16 * rows.stop]:
                    raise ValueError(f"'{name}' does not match its checksum")
                return tensor
        self._verify(name, tensor)
        return tensor if share is None else tensor[rows].clone()

    def entry(self, share: Share | None = None) -> AnyEntry:
        """All of it, or of its keys and values a rank's heads, verified, on the CPU."""
        with _readable():
            read = decoded(self._header, partial(self.read, share=share), len(self.token_ids))
            return self.kind.restore(self._header, read, self.token_ids, self.fingerprint)

    def tensor(self, name: str) -> Tensor:
        """One tensor of the entry, verified and decoded; raises as `read` does."""
        with _readable():
            return decoded(self._header, self.read, len(self.token_ids))(name)

    def verify(self) -> None:
        """Reads every tensor; raises as `read` does."""
        for name in self._sums:
            self.read(name)

    def _header_text(self) -> bytes:
        length = int.from_bytes(self._bytes(0, 8), "little")
        if length > min(self._blob.size - 8, MOST_HEADER):
            raise ValueError("its header is cut off")
        self._start = 8 + length
        return self._bytes(8, length)

    def _bytes(self, start: int, length: int) -> bytes:
        data = bytearray(length)
        if self._blob.read_into(memoryview(data), start) != length:
            raise ValueError("it is cut off")
        return bytes(data)

    def _verify(self, name: str, tensor: Tensor) -> None:
        if self._sums.get(name) != _checksum(xxhash.xxh3_128, name, tensor):
            raise ValueError(f"'{name}' does not match its checksum")
        proven = (*self._file, name)
        if not self._prove or (self._blob.identity is not None and proven in _PROVEN):
            return
        if self._sha256.get(name) != _checksum(hashlib.sha256, name, tensor):
            raise ValueError(f"'{name}' does not match its signed checksum")
        while len(_PROVEN) >= _MOST_PROVEN:
            _PROVEN.pop(next(iter(_PROVEN)), None)
        _PROVEN[proven] = None


def read_chunk(
    blobs: Blobs, key: str, kind: type[AnyEntry], share: Share | None = None
) -> AnyEntry:
    """Reads one entry, or the heads of a tensor parallel rank; raises as `ChunkFile` does.

    Only those heads are read from a folder, unless it is signed or the file is of before they had
    checksums of their own.
    """
    return ChunkFile(blobs, key, kind).entry(share)


def heads_of(rank: int, size: int, num_heads: int) -> slice:
    """The kv heads of one tensor parallel rank; several ranks share one if there are too few."""
    count = max(1, num_heads // size)
    start = rank * num_heads // size
    return slice(start, start + count)


def pack_chunk(
    blobs: Blobs,
    key: str,
    entry: Entry,
    about: About = NOTHING,
    codec: str = "as-is",
    rope: RopeSpec | None = None,
) -> bytes:
    """The content of an entry's file, signed with the key of ``blobs``.

    Args:
        blobs: Where it will be written.
        key: Of the entry.
        entry: Its tensors may be on any device.
        about: What an index of the place needs when it is made again.
        codec: How the tensors are stored, see `blocktune.cache.codecs`.
        rope: As there.
    """
    entry = entry.to("cpu").compact()
    facts, tensors = encoded(entry, codec, rope)
    tensors |= {"token_ids": entry.token_ids}
    header = _header(key, entry, tensors) | facts
    told = {name: getattr(about, name) for name in ("document", "tenant", "seconds", "expires")}
    header |= {name: str(value) for name, value in told.items() if value}
    signed = {}
    if blobs.secret is None:
        by_head = {name: _head_sums(t) for name, t in tensors.items() if name.startswith(_BY_HEAD)}
        header |= {"heads": json.dumps(by_head)} if by_head else {}
    else:
        header["sha256"] = _sums(hashlib.sha256, tensors)
        signed = {"signature": blobs.sign(header)}
    return save(tensors, metadata=header | {"checksum": _digest(header)} | signed)


@contextmanager
def _readable() -> Iterator[None]:
    """One kind of error for whatever a damaged file makes the libraries raise."""
    try:
        yield
    except (OSError, LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"unreadable ({error})") from None


def _header(key: str, entry: Entry, tensors: dict[str, Tensor]) -> dict[str, str]:
    """The file's header: what the entry is, and a checksum of each tensor."""
    return {
        "format": FORMAT,
        "kind": entry.kind,
        "key": key,
        "fingerprint": entry.fingerprint,
        "num_bytes": str(entry.num_bytes),
        "checksums": _sums(xxhash.xxh3_128, tensors),
    } | {name: str(fact) for name, fact in entry.facts().items()}


def _sums(hasher, tensors: dict[str, Tensor]) -> str:
    sums = {name: _checksum(hasher, name, tensor) for name, tensor in tensors.items()}
    return json.dumps(sums, sort_keys=True)


def _head_sums(tensor: Tensor) -> str:
    """16 hex digits for each head."""
    heads = tensor.view(torch.uint8) if tensor.numel() else ()  # an empty one has no buffer
    return "".join(xxhash.xxh3_64_hexdigest(memoryview(one.numpy()).cast("B")) for one in heads)


def _digest(header: dict[str, str]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()


def _checksum(hasher, name: str, tensor: Tensor) -> str:
    digest = hasher(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.numel():  # an empty tensor has no buffer to view
        digest.update(memoryview(tensor.view(torch.uint8).numpy()).cast("B"))
    return digest.hexdigest()
