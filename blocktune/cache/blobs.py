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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from blocktune.cache.config import Row

MANIFESTS = "manifests"
SECRET, SECRET_FILE = "BLOCKTUNE_STORE_KEY", "BLOCKTUNE_STORE_KEY_FILE"
"""Environment variables with the key that signs entries, or the path of a file that holds it."""
LEAST_SECRET = 16
MOST_HEADER = 64 << 20
FIRST_READ = 1 << 16
"""Bytes in which most headers fit."""
_KEY = re.compile(r"[0-9a-f]{64}")


class Blob:
    """A file in memory, or its beginning; times are seconds of the epoch."""

    identity: tuple | None = None  # changes when the file does: hash it once for each
    changed = 0.0  # when it last did

    def __init__(self, data: bytes, size: int | None = None, used: float = 0.0):
        """``size`` is that of the whole file, which was last ``used`` or written then."""
        self.data: memoryview | None = memoryview(data)
        self.size, self.used = len(data) if size is None else size, used

    def read_into(self, buffers: Sequence[memoryview], start: int) -> int:
        """Fills some buffers, one after the other, from byte ``start``; bytes read."""
        done = 0
        for buffer in buffers:
            part = self.data[start + done : start + done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return done

    def content(self, most: int | None = None) -> bytes:
        """All of it, or the first bytes."""
        data = bytearray(self.size if most is None else min(most, self.size))
        return bytes(data[: self.read_into([memoryview(data)], 0)])


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


class Blobs(ABC):
    """The files of a store, by names such as ``ab/cd/KEY.safetensors``.

    ``OSError`` is raised wherever the place cannot be reached.
    """

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
    def _open(self, name: str, most: int | None) -> Blob:
        """See `open`."""

    @abstractmethod
    def _write(self, name: str, data: bytes) -> None:
        """See `write`."""

    @abstractmethod
    def _remove(self, name: str) -> None:
        """Removes a file that was there a moment ago."""

    @abstractmethod
    def listing(self) -> Iterable[tuple[str, int, float]]:
        """Key, size and date of last use of every file, found by listing the place."""

    @abstractmethod
    def _manifests(self) -> Iterable[str]:
        """Names of all manifests, without their ending."""

    def open(self, key: str, most: int | None = None) -> Blob:
        """The file of ``key``, of which only the first ``most`` bytes are wanted.

        FileNotFoundError, or ValueError if something else is there.
        """
        return self._open(relative_path(key), most)

    def write(self, key: str, data: bytes) -> None:
        """Writes a file, whole or not at all; the last of several writers stays."""
        self._write(relative_path(key), data)

    def remove(self, key: str) -> bool:
        """Removes the file of ``key``; whether there was one of ours."""
        try:
            self.open(key, 0)
        except (FileNotFoundError, ValueError):
            return False
        self._remove(relative_path(key))
        return True

    def has(self, key: str) -> bool:
        """Whether there is a file of ``key``; not verified."""
        try:
            self.open(key, 0)
        except (OSError, ValueError):
            return False
        return True

    def keys(self) -> Iterator[str]:
        """Keys of all files, in order."""
        return (key for key, _, _ in self.listing())

    def name(self, key: str) -> str:
        """Where the file of ``key`` is, for messages."""
        return f"{self.place}/{relative_path(key)}"

    def touch(self, key: str) -> None:
        """Notes that the file of ``key`` was used, where the place has a date for that."""
        return

    def clean(self) -> int:
        """Removes what stopped writers left, where they leave anything; how many files."""
        return 0

    def facts(self, key: str) -> tuple[dict[str, str], Row]:
        """A file's header and what an index says of it, not verified; raises as `open` does."""
        file = self.open(key, FIRST_READ)
        data = file.content(FIRST_READ)
        end = 8 + int.from_bytes(data[:8], "little")
        if len(data) < end <= min(file.size, MOST_HEADER):
            data = self.open(key, end).content(end)
        if end > len(data):
            raise ValueError("its header is cut off")
        try:
            header = json.loads(data[8:end])
            [num_tokens] = header["token_ids"]["shape"]
            facts = {str(name): str(text) for name, text in header["__metadata__"].items()}
            return facts, Row.of(facts, int(num_tokens), key, file.size, file.used)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError("its header is not that of a chunk") from None

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

    def fingerprints(self) -> list[str]:
        """Models that have a manifest."""
        return sorted(filter(is_key, self._manifests()))

    def write_manifest(self, record: Mapping[str, Any]) -> None:
        """Writes the manifest of a model, see `blocktune.cache.fingerprint`; raises as `write`."""
        signed = {} if self.secret is None else {"signature": self.sign(record)}
        text = json.dumps(dict(record) | signed, indent=1, ensure_ascii=False) + "\n"
        self._write(_manifest(record["fingerprint"]), text.encode())

    def manifest(self, fingerprint: str) -> dict[str, Any] | None:
        """The manifest of a model, or None; ValueError if it is damaged, or not signed."""
        name = _manifest(fingerprint)
        try:
            record = json.loads(self._open(name, None).content())
            if not isinstance(record, dict) or record.get("fingerprint") != fingerprint:
                raise ValueError(f"not that of {fingerprint[:12]}")
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{self.place}/{name}: not a manifest ({error})") from None
        try:
            self.require_signed(record, record.pop("signature", None))
        except ValueError as error:
            raise ValueError(f"{self.place}/{name}: {error}") from None
        return record


def _manifest(fingerprint: str) -> str:
    if not is_key(fingerprint):
        raise ValueError(f"a fingerprint is 64 hex digits; got {fingerprint!r}")
    return f"{MANIFESTS}/{fingerprint}.json"
