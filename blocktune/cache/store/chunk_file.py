"""The safetensors file of one entry: how it is packed, and how it is verified when read."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from typing import Any

import torch
import xxhash
from safetensors.torch import save
from torch import Tensor

from blocktune.cache.chunk_kv import ChunkKV, Entry
from blocktune.cache.store.blobs import Blobs, header_end
from blocktune.cache.store.codecs import decoded, encoded
from blocktune.cache.store.ledger import About, Row
from blocktune.positions import RopeSpec

FORMAT = "blocktune chunk 3"
# By their names in a safetensors header.
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DTYPES |= {"F8_E4M3": torch.float8_e4m3fn, "I64": torch.int64, "I32": torch.int32}
DTYPES |= {"I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
_ALL = "*"
SETTLED_S = 2.0  # a file that changed later may change again within the clock's resolution
PAGE = 4096
Share = tuple[int, int]  # a tensor-parallel rank and the number of ranks
_BY_HEAD = ("key.", "value.")  # starts of the names of tensors whose first axis is the kv heads


class Expired(FileNotFoundError):
    """The entry has outlived its time to live."""


class ChunkFile:
    """An open file of a store. Header and token ids are verified at once, tensors when read.

    xxh3 checksums find damage; signed SHA-256 sums, with a key, forgery. Each process verifies a
    file once, and again only after the file changed.
    """

    def __init__(
        self, blobs: Blobs, key: str, kind: type[Entry] | None = None, most: int | None = None
    ):
        """Opens the entry of ``key``. Without a ``kind`` only `verify` can be used.

        ``most``: bytes to fetch from a remote. Raises OSError, FileNotFoundError, `Expired`, or
        ValueError for any other file.
        """
        self.key, self.kind, self.blob = key, kind, blobs.open(key, most)
        self._is_signed, self._data = blobs.secret is not None, None
        settled = self.blob.identity is not None and time.time() - self.blob.changed >= SETTLED_S
        state = key, blobs.secret, self.blob.identity
        self._verified, memo = (_verified_of(state), _header_of(state)) if settled else (set(), {})
        fresh = {} if memo else self._read_header(blobs)
        vars(self).update(memo or fresh)
        identity = (self._header["format"], self._header["kind"], self._header["key"])
        if identity != (FORMAT, identity[1] if kind is None else kind.kind, key):
            raise ValueError("its header names another chunk or cache format")
        if 0 < float(self._header.get("expires", 0)) <= time.time():
            raise Expired(key)
        if fresh:
            fresh["token_ids"] = self.token_ids = self.read("token_ids")
            memo.update(fresh)

    def _read_header(self, blobs: Blobs) -> dict[str, Any]:
        with _readable():
            start = header_end(self.blob)
            tensors = json.loads(self.blob.content(start)[8:])
            header = dict(tensors.pop("__metadata__"))
            checksum, signature = (header.pop(n, None) for n in ("checksum", "signature"))
            attrs = {"_tensors": tensors, "_header": header, "_start": start}
            attrs["_sums"] = dict(json.loads(header["checksums"]))
            attrs["_heads"] = {} if blobs.secret else json.loads(header.get("heads", "{}"))
            attrs["_sha256"] = dict(json.loads(header.get("sha256", "{}")))
            attrs |= {"fingerprint": header["fingerprint"], "codec": header.get("codec", "as-is")}
            header["format"], header["kind"], header["key"]
        if checksum != digest(**header):
            raise ValueError("its header does not match its checksum")
        blobs.require_signed(header, signature)
        return attrs

    matches = Entry.matches

    def row(self) -> Row:
        """The file's row in an index."""
        size, used = self.blob.size, self.blob.used
        return Row.of(self._header, len(self.token_ids), self.key, size, used)

    def read(self, name: str, share: Share | None = None) -> Tensor:
        """Reads and verifies a tensor, or one rank's heads of it. Raises ValueError if damaged."""
        with _readable():
            info = self._tensors[name]
            (start, end), shape = info["data_offsets"], info["shape"]
            share = share if name.startswith(_BY_HEAD) else None
            rows = slice(0, None) if share is None else heads_of(*share, shape[0])
            by_head = share is not None and name in self._heads
            if by_head:
                row = (end - start) // shape[0]
                start, end = start + rows.start * row, start + rows.stop * row
                shape = [rows.stop - rows.start, *shape[1:]]
            tensor = self._fetch(start, end).view(DTYPES[info["dtype"]]).view(shape)
            if by_head:
                if _head_sums(tensor) != self._heads[name][16 * rows.start : 16 * rows.stop]:
                    raise ValueError(f"'{name}' does not match its checksum")
                return tensor
        self._verify(name, tensor)
        return tensor if share is None else tensor[rows].clone()

    def read_into(self, name: str, out: Tensor) -> None:
        """Reads and verifies an uncompressed tensor ``(K, S, D)`` into ``out``, as `read` does.

        Each of its ``K`` parts must be contiguous CPU memory.
        """
        with _readable():
            start, end = self._tensors[name]["data_offsets"]
            parts = out.view(torch.uint8).numpy()
            parts = parts[None] if parts.flags.c_contiguous else parts
            if parts.size != end - start:
                raise ValueError("it has another size than the output tensor")
            self._fill([memoryview(part).cast("B") for part in parts], start, end)
        if not self._is_verified(name):
            self._verify(name, out.contiguous())

    def entry(self, share: Share | None = None) -> Entry:
        """Reads and verifies the whole entry, on the CPU. Its tensors share one buffer.

        With a ``share``, only that rank's heads of keys and values, read from the file alone if it
        has sums of them.
        """
        with _readable():
            if share is None:
                self._data = self._fetch(0, self.blob.size - self._start)
            read = decoded(self._header, partial(self.read, share=share), len(self.token_ids))
            return self.kind.restore(self._header, read, self.token_ids, self.fingerprint)

    def verify(self, force: bool = True) -> None:
        """Reads every tensor; without ``force``, those not verified yet. Raises as `read` does."""
        self._verified = set() if force else self._verified
        for name in self._sums:
            if not self._is_verified(name):
                self.read(name)

    def _fetch(self, start: int, end: int) -> Tensor:
        if not 0 <= start <= end <= self.blob.size - self._start:
            raise ValueError("it is cut off")
        if self._data is not None:
            return self._data[start:end]
        raw = torch.empty(end - start, dtype=torch.uint8)
        self._fill([memoryview(raw.numpy())], start, end)
        return raw

    def _fill(self, buffers: list[memoryview], start: int, end: int) -> None:
        if self.blob.read_into(buffers, self._start + start) != end - start:
            raise ValueError("it is cut off")

    def _is_verified(self, name: str) -> bool:
        return name in self._verified or (_ALL in self._verified and name in self._sums)

    def _verify(self, name: str, tensor: Tensor) -> None:
        if self._is_verified(name):
            return
        if self._sums.get(name) != _checksum(xxhash.xxh3_128, name, tensor):
            raise ValueError(f"'{name}' does not match its checksum")
        if self._is_signed and self._sha256.get(name) != _checksum(hashlib.sha256, name, tensor):
            raise ValueError(f"'{name}' does not match its signed checksum")
        self._verified.add(name)
        if len(self._verified) == len(self._sums):  # one string for all names
            self._verified.clear()
            self._verified.add(_ALL)


@lru_cache(1 << 16)
def _verified_of(state: tuple) -> set[str]:
    """Names of the tensors (or `_ALL`) that this process has verified of a file in one state."""
    return set()


@lru_cache(1 << 10)
def _header_of(state: tuple) -> dict[str, Any]:
    """Verified header and token ids of a file in one state; filled by `ChunkFile`."""
    return {}


def heads_of(rank: int, size: int, num_heads: int) -> slice:
    """The kv heads of a tensor-parallel rank. Ranks share heads if there are fewer heads."""
    count = max(1, num_heads // size)
    start = rank * num_heads // size
    return slice(start, start + count)


class FileKV(ChunkKV):
    """A chunk in a verified ``file``, whose layers are read later by `ChunkFile.read_into`.

    Its own tensors have shapes and dtypes, but no data: they are on the device ``meta``.
    """

    file: ChunkFile

    @classmethod
    def read(cls, file: ChunkFile) -> ChunkKV:
        """Verifies a file and wraps it; a file stored with a codec is read whole."""
        if file.codec != "as-is":
            return file.entry()
        file.verify(force=False)

        def empty(name: str) -> Tensor:
            info = file._tensors[name]
            return torch.empty(info["shape"], dtype=DTYPES[info["dtype"]], device="meta")

        with _readable():
            kv = cls.restore(file._header, empty, file.token_ids, file.fingerprint)
        vars(kv)["file"] = file
        return kv

    def to(self, device: torch.device | str) -> FileKV:
        """Returns itself: layers are read into CPU memory."""
        return self


def pack_chunk(
    blobs: Blobs, key: str, entry: Entry, about: About, codec: str, rope: RopeSpec | None
) -> bytes:
    """An entry's file, with ``about`` to rebuild an index from. Raises as `encoded` does."""
    entry = entry.to("cpu").compact()
    facts, tensors = encoded(entry, codec, rope)
    tensors |= {"token_ids": entry.token_ids}
    header = {"format": FORMAT, "kind": entry.kind, "key": key, "fingerprint": entry.fingerprint}
    header |= {"num_bytes": str(entry.num_bytes), "checksums": _sums(xxhash.xxh3_128, tensors)}
    header |= {name: str(fact) for name, fact in entry.facts().items()} | facts
    details = {name: getattr(about, name) for name in ("document", "tenant", "seconds", "expires")}
    header |= {name: str(value) for name, value in details.items() if value}
    signed = {}
    if blobs.secret is None:
        by_head = {name: _head_sums(t) for name, t in tensors.items() if name.startswith(_BY_HEAD)}
        header |= {"heads": json.dumps(by_head)} if by_head else {}
    else:
        header["sha256"] = _sums(hashlib.sha256, tensors)
        signed = {"signature": blobs.sign(header)}
    data = save(tensors, metadata=header | {"checksum": digest(**header)} | signed)
    # Pad the header with spaces so that the first tensor after the token ids starts at a page:
    # unaligned copies out of the page cache run at down to half the speed.
    length = int.from_bytes(data[:8], "little")
    spaces = -(8 + length + entry.token_ids.nbytes) % PAGE
    head = (length + spaces).to_bytes(8, "little"), data[8 : 8 + length], b" " * spaces
    return b"".join((*head, memoryview(data)[8 + length :]))


@contextmanager
def _readable() -> Iterator[None]:
    """Turns what a damaged file raises into one ValueError, not OSError. It may be nested."""
    try:
        yield
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"unreadable: {str(error).removeprefix('unreadable: ')}") from None


def _sums(hasher, tensors: dict[str, Tensor]) -> str:
    sums = {name: _checksum(hasher, name, tensor) for name, tensor in tensors.items()}
    return json.dumps(sums, sort_keys=True)


def _head_sums(tensor: Tensor) -> str:
    """Checksums of all heads in one string, 16 hex digits each."""
    heads = tensor.view(torch.uint8) if tensor.numel() else ()  # an empty tensor has no buffer
    return "".join(xxhash.xxh3_64_hexdigest(memoryview(head.numpy()).cast("B")) for head in heads)


def digest(**parts: Any) -> str:
    """Hex SHA-256 of JSON values by name."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _checksum(hasher, name: str, tensor: Tensor) -> str:
    digest = hasher(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
    if tensor.numel():  # an empty tensor has no buffer to view
        digest.update(memoryview(tensor.view(torch.uint8).numpy()).cast("B"))
    return digest.hexdigest()
