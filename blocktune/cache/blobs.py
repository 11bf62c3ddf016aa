"""Files of chunks by their keys, wherever they are kept: what a folder and a remote have in common.

No torch: listing needs no model.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from blocktune.cache.ledger import Row

MANIFESTS = "manifests"
SECRET, SECRET_FILE = "BLOCKTUNE_STORE_KEY", "BLOCKTUNE_STORE_KEY_FILE"
"""Environment variables with the key that signs entries, or the path of a file that holds it."""
LEAST_SECRET = 16
MOST_HEADER = 64 << 20
FIRST_READ = 1 << 16
"""Bytes in which most headers fit."""
_KEY = re.compile(r"[0-9a-f]{64}")


class FileFacts(NamedTuple):
    """What a listing says of one entry, not verified."""

    header: dict[str, str]  # what `ChunkFile` reads
    num_tokens: int
    size: int  # bytes of the file
    used: float  # when it was last used or written, in seconds of the epoch

    def row(self, key: str) -> Row:
        """As an index has it."""
        header = self.header
        try:
            seconds, expires = (float(header.get(name, 0.0)) for name in ("seconds", "expires"))
        except ValueError:
            seconds = expires = 0.0
        texts = (header.get(n, "") for n in ("kind", "fingerprint", "document", "tenant"))
        times = {"created": self.used, "used": self.used, "expires": expires or None}
        return Row(self.num_tokens, *texts, seconds, key=key, size=self.size, uses=1, **times)


class Head(NamedTuple):
    """The first bytes of a file, its size, and when it was last used or written."""

    data: bytes
    size: int
    used: float


class Blob(ABC):
    """An open file; times are seconds of the epoch."""

    size: int
    identity: tuple | None = None  # changes when the file does: hash it once for each
    changed: float = 0.0  # when it last did
    used: float = 0.0  # when it was last used or written

    @abstractmethod
    def read_into(self, buffers: Sequence[memoryview], start: int) -> int:
        """Fills some buffers, one after the other, from byte ``start``; bytes read."""


class Bytes(Blob):
    """A file in memory."""

    def __init__(self, data: bytes):
        self.data, self.size = memoryview(data), len(data)

    def read_into(self, buffers: Sequence[memoryview], start: int) -> int:
        """See `Blob.read_into`."""
        done = 0
        for buffer in buffers:
            part = self.data[start + done : start + done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return done


def is_key(text: str) -> bool:
    """Whether a text is 64 hex digits."""
    return _KEY.fullmatch(text) is not None


def relative_path(key: str) -> str:
    """Where a chunk is stored below its folder: two levels keep each folder short."""
    if not is_key(key):
        raise ValueError(f"a chunk key is 64 hex digits, see `chunk_key`; got {key!r}")
    return f"{key[:2]}/{key[2:4]}/{key}.safetensors"


def secret_from_environment() -> bytes | None:
    """The key that signs entries: `SECRET`, or the content of the file `SECRET_FILE`; or None."""
    text, path = os.environ.get(SECRET), os.environ.get(SECRET_FILE)
    if text is None and path is None:
        return None
    try:
        return text.encode() if text is not None else Path(path).read_bytes().strip()
    except OSError as error:
        raise ValueError(f"{SECRET_FILE}: cannot read '{path}': {error.strerror}") from None


def read_facts(data: bytes, size: int, used: float) -> FileFacts:
    """What the header of a file says, from its first bytes."""
    length = int.from_bytes(data[:8], "little")
    if length + 8 > len(data):
        raise ValueError("its header is cut off")
    try:
        header = json.loads(data[8 : 8 + length])
        [num_tokens] = header["token_ids"]["shape"]
        facts = {str(name): str(text) for name, text in header["__metadata__"].items()}
        return FileFacts(facts, int(num_tokens), size, used)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError("its header is not that of a chunk") from None


class Blobs(ABC):
    """The files of a store. ``OSError`` is raised wherever the place cannot be reached."""

    place: str  # folder or URL, for messages

    def __init__(self, secret: bytes | None = None):
        """With a ``secret`` that signs what is written, and must have signed the rest; or none."""
        self.secret = secret
        if secret is not None and len(secret) < LEAST_SECRET:
            raise ValueError(
                f"the key of a store has at least {LEAST_SECRET} bytes, got {len(secret)}; make "
                f"one with `openssl rand -hex 32`, or unset {SECRET} and {SECRET_FILE}"
            )

    @abstractmethod
    def open(self, key: str) -> Blob:
        """The file of ``key``; FileNotFoundError, or ValueError if something else is there."""

    @abstractmethod
    def head(self, key: str, length: int) -> Head:
        """The first ``length`` bytes of a file; raises as `open` does."""

    @abstractmethod
    def write(self, key: str, data: bytes) -> None:
        """Writes a file, whole or not at all; the last of several writers stays."""

    @abstractmethod
    def remove(self, key: str) -> bool:
        """Removes the file of ``key``; whether there was one of ours."""

    @abstractmethod
    def has(self, key: str) -> bool:
        """Whether there is a file of ``key``; not verified."""

    @abstractmethod
    def keys(self) -> Iterator[str]:
        """Keys of all files, found by listing the place."""

    @abstractmethod
    def fingerprints(self) -> list[str]:
        """Models that have a manifest."""

    @abstractmethod
    def _read_manifest(self, fingerprint: str) -> bytes:
        """Content of a manifest; FileNotFoundError if there is none."""

    @abstractmethod
    def _write_manifest(self, fingerprint: str, data: bytes) -> None:
        """Writes a manifest, whole or not at all."""

    def name(self, key: str) -> str:
        """Where the file of ``key`` is, for messages."""
        return f"{self.place}/{relative_path(key)}"

    def touch(self, key: str) -> None:
        """Notes that the file of ``key`` was used, where the place has a date for that."""
        return

    def facts(self, key: str) -> FileFacts:
        """What the header of a file says, without its tensors; raises as `open` does."""
        data, size, used = self.head(key, FIRST_READ)
        length = int.from_bytes(data[:8], "little")
        if len(data) < length + 8 <= min(size, MOST_HEADER):
            data = self.head(key, length + 8).data
        return read_facts(data, size, used)

    def sign(self, record: Mapping[str, Any]) -> str:
        """HMAC-SHA-256 of plain JSON values under the store's key, in hex; needs a key."""
        text = json.dumps(record, sort_keys=True).encode()
        return hmac.new(self.secret, text, hashlib.sha256).hexdigest()

    def require_signed(self, record: Mapping[str, Any], signature: str | None) -> None:
        """With a key, ValueError unless it signed the record; without one, accepts all."""
        if self.secret is None:
            return
        if not hmac.compare_digest(str(signature or "").encode(), self.sign(record).encode()):
            raise ValueError("it is not signed with the key of this store")

    def write_manifest(self, record: Mapping[str, Any]) -> None:
        """Writes the manifest of a model, see `blocktune.cache.fingerprint`; raises as `write`."""
        signed = {} if self.secret is None else {"signature": self.sign(record)}
        text = json.dumps(dict(record) | signed, indent=1, ensure_ascii=False) + "\n"
        self._write_manifest(_fingerprint(record["fingerprint"]), text.encode())

    def manifest(self, fingerprint: str) -> dict[str, Any] | None:
        """The manifest of a model, or None; ValueError if it is damaged, or not signed."""
        where = f"{self.place}/{MANIFESTS}/{_fingerprint(fingerprint)}.json"
        try:
            record = json.loads(self._read_manifest(fingerprint))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{where}: not a manifest ({error})") from None
        if not isinstance(record, dict) or record.get("fingerprint") != fingerprint:
            raise ValueError(f"{where}: not a manifest of {fingerprint[:12]}")
        try:
            self.require_signed(record, record.pop("signature", None))
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None
        return record


def _fingerprint(text: str) -> str:
    if not is_key(text):
        raise ValueError(f"a fingerprint is 64 hex digits; got {text!r}")
    return text
