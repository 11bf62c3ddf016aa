"""Chunk files by key: the interface that a folder and a remote share. No torch is imported."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from blocktune.cache.store.config import Row

MANIFESTS = "manifests"
# Environment variables that hold the signing key, or the path of a file with it.
SECRET, SECRET_FILE = "BLOCKTUNE_STORE_KEY", "BLOCKTUNE_STORE_KEY_FILE"
LEAST_SECRET = 16
MOST_HEADER = 64 << 20
FIRST_READ = 1 << 16  # bytes of the first read of a file; most headers fit
is_key = re.compile(r"[0-9a-f]{64}").fullmatch


class Blob:
    """The content of a file, or its first bytes, in memory. Times are seconds since the epoch."""

    identity: tuple | None = None  # differs whenever the file has changed; None: unknown
    changed = 0.0  # time of the last change

    def __init__(self, data: bytes, size: int | None = None, used: float = 0.0):
        """Wraps ``data``. ``size`` is that of the whole file, ``used`` its last use or write."""
        self.data: memoryview | None = memoryview(data)
        self.size, self.used = len(data) if size is None else size, used

    def read_into(self, buffers: Sequence[memoryview], start: int) -> int:
        """Fills the buffers in order, from byte ``start`` on. Returns the number of bytes read."""
        done = 0
        for buffer in buffers:
            part = self.data[start + done : start + done + len(buffer)]
            buffer[: len(part)] = part
            done += len(part)
        return done

    def content(self, most: int | None = None) -> bytes:
        """The whole file, or its first ``most`` bytes."""
        data = bytearray(self.size if most is None else min(most, self.size))
        return bytes(data[: self.read_into([memoryview(data)], 0)])


def relative_path(key: str) -> str:
    """Path of a chunk's file relative to the store. Two levels of folders keep each one small."""
    if not is_key(key):
        raise ValueError(f"a chunk key is 64 hex digits, see `chunk_key`; got {key!r}")
    return f"{key[:2]}/{key[2:4]}/{key}.safetensors"


def states_key(chunk_key: str, layer: int) -> str:
    """Key of a chunk's states at ``layer`` (0-based): the chunk's own key, hashed."""
    return hashlib.sha256(f"{chunk_key} states {layer}".encode()).hexdigest()


def header_end(file: Blob) -> int:
    """Length in bytes of the header of a safetensors file. Raises ValueError if it is cut off."""
    end = 8 + int.from_bytes(file.content(8), "little")
    if end > min(file.size, MOST_HEADER):
        raise ValueError("its header is cut off")
    return end


def secret_from_environment() -> bytes | None:
    """The signing key from `SECRET` or from the file that `SECRET_FILE` names; None if unset."""
    text, path = os.environ.get(SECRET), os.environ.get(SECRET_FILE)
    if text is None and path is None:
        return None
    try:
        return (Path(path).read_bytes() if text is None else text.encode()).strip()
    except OSError as error:
        raise ValueError(f"{SECRET_FILE}: cannot read '{path}': {error.strerror}") from None


class Blobs(ABC):
    """The files of a store, such as ``ab/cd/KEY.safetensors``. OSError: it is out of reach."""

    place: str  # folder or URL, for messages
    timeout_s: float  # limit on one request, of remotes where a client has none of its own

    def __init__(self, secret: bytes | None = None):
        """If there is a ``secret``, it signs files that are written and verifies those read."""
        self.secret = secret
        if secret is not None and len(secret) < LEAST_SECRET:
            given = f"{LEAST_SECRET} bytes, got {len(secret)}; `openssl rand -hex 32` makes one"
            raise ValueError(f"the key of a store ({SECRET}, {SECRET_FILE}) has at least {given}")

    @abstractmethod
    def _open(self, name: str, most: int | None) -> Blob:
        """See `open`."""

    @abstractmethod
    def _write(self, name: str, data: bytes) -> None:
        """See `write`."""

    @abstractmethod
    def _remove(self, name: str) -> None:
        """Removes a file that was found a moment ago. May raise FileNotFoundError."""

    @abstractmethod
    def listing(self) -> Iterable[tuple[str, int, float]]:
        """Lists the files. Yields each one's key, size in bytes and time of last use."""

    @abstractmethod
    def _manifests(self) -> Iterable[str]:
        """Names of all manifests, without the suffix."""

    def open(self, key: str, most: int | None = None) -> Blob:
        """Opens a file, or its first ``most`` bytes. ValueError: it is something else."""
        return self._open(relative_path(key), most)

    def write(self, key: str, data: bytes) -> None:
        """Writes a file atomically. If several processes write the same key, the last one wins."""
        self._write(relative_path(key), data)

    def remove(self, key: str) -> bool:
        """Removes the file of ``key``. Returns whether the store had one."""
        with suppress(FileNotFoundError, ValueError):  # also if another process was faster
            self.open(key, 0)
            self._remove(relative_path(key))
            return True
        return False

    def has(self, key: str) -> bool:
        """Whether there is a file of ``key``. Its content is not verified."""
        with suppress(OSError, ValueError):
            return self.open(key, 0) is not None
        return False

    def keys(self) -> Iterator[str]:
        """Keys of all files, sorted."""
        return (key for key, _, _ in self.listing())

    def name(self, key: str) -> str:
        """Full name of the file of ``key``, which error messages show."""
        return f"{self.place}/{relative_path(key)}"

    def touch(self, key: str) -> None:
        """Updates the time of last use of ``key``, if the storage records one."""
        return

    def clean(self) -> int:
        """Removes files that interrupted writers left behind. Returns how many."""
        return 0

    def facts(self, key: str) -> tuple[dict[str, str], Row]:
        """A file's header and its row for the index, both unverified. Raises as `open` does."""
        file = self.open(key, FIRST_READ)
        if (end := header_end(file)) > FIRST_READ:
            file = self.open(key, end)
        try:
            header = json.loads(file.content(end)[8:])
            [num_tokens] = header["token_ids"]["shape"]
            facts = {str(name): str(text) for name, text in header["__metadata__"].items()}
            return facts, Row.of(facts, int(num_tokens), key, file.size, file.used)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise ValueError("its header is not that of a chunk") from None

    def sign(self, record: Mapping[str, Any]) -> str:
        """Hex HMAC-SHA-256 of a record of JSON values. Needs a signing key."""
        text = json.dumps(record, sort_keys=True).encode()
        return hmac.new(self.secret, text, hashlib.sha256).hexdigest()

    def require_signed(self, record: Mapping[str, Any], signature: str | None) -> None:
        """Raises ValueError if the store has a signing key that did not sign the record."""
        given = str(signature or "").encode()
        if self.secret is not None and not hmac.compare_digest(given, self.sign(record).encode()):
            raise ValueError("it is not signed with the key of this store")

    def fingerprints(self) -> list[str]:
        """Fingerprints of the models that have a manifest, sorted."""
        return sorted(filter(is_key, self._manifests()))

    def write_manifest(self, record: Mapping[str, Any]) -> None:
        """Writes a manifest (see `store.fingerprint`). Raises as `write` does."""
        signed = {} if self.secret is None else {"signature": self.sign(record)}
        text = json.dumps(dict(record) | signed, indent=1, ensure_ascii=False) + "\n"
        self._write(_manifest(record["fingerprint"]), text.encode())

    def manifest(self, fingerprint: str) -> dict[str, Any] | None:
        """A model's manifest, or None. Raises ValueError if it is damaged or not signed."""
        name = _manifest(fingerprint)
        try:
            record = json.loads(self._open(name, None).content())
            if not isinstance(record, dict) or record.get("fingerprint") != fingerprint:
                raise ValueError(f"it does not describe model {fingerprint[:12]}")
            self.require_signed(record, record.pop("signature", None))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"cannot use the manifest {self.place}/{name}: {error}") from None
        return record


def _manifest(fingerprint: str) -> str:
    if not is_key(fingerprint):
        raise ValueError(f"a fingerprint is 64 hex digits; got {fingerprint!r}")
    return f"{MANIFESTS}/{fingerprint}.json"
