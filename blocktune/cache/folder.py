"""The folder of a store: which of its files are the store's, and how those are read and written.

A file is the store's if it is a plain file under a name of ours in real folders. Links are never
followed, and nothing else is read, replaced or removed. No torch: listing needs no model.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import hmac
import json
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from blocktune.files import sync

WRITING = ".writing"
"""Folder inside a store for unfinished files: the same file system, so renaming is atomic."""
MANIFESTS = "manifests"
SECRET, SECRET_FILE = "BLOCKTUNE_STORE_KEY", "BLOCKTUNE_STORE_KEY_FILE"
"""Environment variables with the key that signs entries, or the path of a file that holds it."""
LEAST_SECRET = 16
_KEY = re.compile(r"[0-9a-f]{64}")
_UNFINISHED = re.compile(r"\.[0-9a-f]{64}-[0-9a-f]{32}\.part")
_UNFINISHED_BEFORE = re.compile(r"\.[0-9a-f]{64}-[a-z0-9_]{8}\.safetensors")  # of older versions
_ABANDONED_S = 3600
_MOST_HEADER = 64 << 20
_TAKEN = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


class FileFacts(NamedTuple):
    """What a listing says of one entry, not verified.

    Attributes:
        header: What `blocktune.cache.chunk_file` wrote about it.
        num_tokens: Tokens of the chunk.
        size: Bytes of the file.
        used: When it was last used or written, in seconds of the epoch.
    """

    header: dict[str, str]
    num_tokens: int
    size: int
    used: float


def secret_from_environment() -> bytes | None:
    """The key that signs entries: `SECRET`, or the content of the file `SECRET_FILE`; or None.

    Raises:
        ValueError: If the file cannot be read.
    """
    text, path = os.environ.get(SECRET), os.environ.get(SECRET_FILE)
    if text is None and path is None:
        return None
    try:
        return text.encode() if text is not None else Path(path).read_bytes().strip()
    except OSError as error:
        raise ValueError(f"{SECRET_FILE}: cannot read '{path}': {error.strerror}") from None


def chunk_path(folder: Path, key: str) -> Path:
    """Where a chunk is stored: two levels of folders keep each of them short.

    Raises:
        ValueError: If the key is not one that `chunk_key` makes.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(f"a chunk key is 64 hex digits, see `chunk_key`; got {key!r}")
    return folder / key[:2] / key[2:4] / f"{key}.safetensors"


def is_taken(error: OSError) -> bool:
    """Whether one path is occupied by something foreign; the disk as a whole can be written."""
    return error.errno in _TAKEN


class ChunkFolder:
    """The files of a store, by their keys."""

    def __init__(self, path: str | Path, secret: bytes | None = None):
        """Of the folder ``path``; ``secret`` signs what is written, and must have signed the rest.

        Raises:
            ValueError: If ``secret`` is too short.
        """
        self.path, self.secret = Path(path), secret
        if secret is not None and len(secret) < LEAST_SECRET:
            raise ValueError(
                f"the key of a store has at least {LEAST_SECRET} bytes, got {len(secret)}; make "
                f"one with `openssl rand -hex 32`, or unset {SECRET} and {SECRET_FILE}"
            )

    def prepare(self) -> None:
        """Makes the folder, checks that it can be written, removes unfinished files.

        Raises:
            ValueError: If something other than a folder is there.
            OSError: If it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"cannot use '{self.path}' as a chunk store: {error.strerror}; name a folder"
            ) from None
        self._make(self.path / WRITING)
        probe = self._unfinished("0" * 64)
        os.close(os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        probe.unlink(missing_ok=True)
        self.clean()

    def clean(self) -> int:
        """Removes what stopped writers left behind, and nothing that a running one still needs.

        Returns:
            Files removed.
        """
        removed = 0
        for entry in self._entries(self.path / WRITING):
            with suppress(OSError, ValueError):  # gone meanwhile, or another user's
                if entry.is_file(follow_symlinks=False):
                    age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                    removed += _remove_unfinished(Path(entry.path), age > _ABANDONED_S)
        return removed

    def open(self, key: str) -> int:
        """A descriptor of the file of ``key``, to read.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If something else is at its path: a link, a folder, a pipe.
        """
        path = chunk_path(self.path, key)
        for parent in (path.parent.parent, path.parent):
            if not stat.S_ISDIR(os.lstat(parent).st_mode):
                raise ValueError(f"'{parent}' is not a folder of the store")
        # Without O_NONBLOCK a pipe would wait for a writer.
        return _plain(path, os.O_RDONLY | os.O_NONBLOCK)

    def write(self, key: str, data: bytes) -> None:
        """Writes a file so that readers see the old one, none, or the whole new one.

        Several processes may write the same key at once: the last one stays.

        Raises:
            OSError: If the disk refuses; nothing is left behind. One that `is_taken` if something
                that is not the store's is at the file's path.
        """
        path = chunk_path(self.path, key)
        self._make(path.parent.parent)
        self._make(path.parent)
        self._replace(path, key, data)

    def remove(self, key: str) -> bool:
        """Removes the file of ``key``; whether there was one of ours.

        Raises:
            OSError: If the disk refuses.
        """
        try:
            os.close(self.open(key))
        except (FileNotFoundError, ValueError):
            return False
        chunk_path(self.path, key).unlink(missing_ok=True)
        return True

    def has(self, key: str) -> bool:
        """Whether there is a file of ``key``; not verified."""
        try:
            os.close(self.open(key))
        except (OSError, ValueError):
            return False
        return True

    def keys(self) -> Iterator[str]:
        """Keys of all files, in order."""
        for first in self._folders(self.path):
            for second in self._folders(first):
                for entry in self._entries(second):
                    key, _, suffix = entry.name.partition(".")
                    named = suffix == "safetensors" and _KEY.fullmatch(key)
                    here = named and Path(entry.path) == chunk_path(self.path, key)
                    if here and entry.is_file(follow_symlinks=False):
                        yield key

    def facts(self, key: str) -> FileFacts:
        """What the header of a file says, without reading its tensors.

        Raises:
            FileNotFoundError: If there is none.
            ValueError: If the header cannot be read.
        """
        with os.fdopen(self.open(key), "rb") as file:
            status = os.fstat(file.fileno())
            length = int.from_bytes(file.read(8), "little")
            if length > min(status.st_size, _MOST_HEADER):
                raise ValueError("its header is cut off")
            try:
                header = json.loads(file.read(length))
                [num_tokens] = header["token_ids"]["shape"]
                facts = {str(name): str(text) for name, text in header["__metadata__"].items()}
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ValueError("its header is not that of a chunk") from None
            return FileFacts(facts, num_tokens, status.st_size, status.st_mtime)

    def touch(self, key: str) -> None:
        """Notes that the file of ``key`` was used, where the disk lets us: `FileFacts.used`."""
        with suppress(OSError):
            os.utime(chunk_path(self.path, key), follow_symlinks=False)

    def sign(self, record: Mapping[str, Any]) -> str:
        """HMAC-SHA-256 of plain JSON values under the folder's key, in hex; needs a key."""
        text = json.dumps(record, sort_keys=True).encode()
        return hmac.new(self.secret, text, hashlib.sha256).hexdigest()

    def require_signed(self, record: Mapping[str, Any], signature: str | None) -> None:
        """With a key, requires that it signed the record; without one, accepts all.

        Raises:
            ValueError: If it did not.
        """
        if self.secret is None:
            return
        if not hmac.compare_digest(str(signature or "").encode(), self.sign(record).encode()):
            raise ValueError("it is not signed with the key of this store")

    def write_manifest(self, record: Mapping[str, Any]) -> None:
        """Writes the manifest of a model, see `blocktune.cache.manifest`; raises as `write`."""
        signed = {} if self.secret is None else {"signature": self.sign(record)}
        text = json.dumps(dict(record) | signed, indent=1, ensure_ascii=False) + "\n"
        self._make(self.path / MANIFESTS)
        name = record["fingerprint"]
        self._replace(self._manifest(name), name, text.encode())

    def manifest(self, fingerprint: str) -> dict[str, Any] | None:
        """The manifest of a model, or None.

        Raises:
            ValueError: If it cannot be read, or a key is set that did not sign it.
        """
        path = self._manifest(fingerprint)
        try:
            with os.fdopen(_plain(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                record = json.loads(file.read())
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise ValueError(f"{path}: not a manifest ({error})") from None
        if not isinstance(record, dict) or record.get("fingerprint") != fingerprint:
            raise ValueError(f"{path}: not a manifest of {fingerprint[:12]}")
        try:
            self.require_signed(record, record.pop("signature", None))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        return record

    def fingerprints(self) -> list[str]:
        """Models that have a manifest."""
        names = (entry.name.removesuffix(".json") for entry in self._entries(self.path / MANIFESTS))
        return sorted(name for name in names if _KEY.fullmatch(name))

    def _manifest(self, fingerprint: str) -> Path:
        if not _KEY.fullmatch(fingerprint):
            raise ValueError(f"a fingerprint is 64 hex digits; got {fingerprint!r}")
        return self.path / MANIFESTS / f"{fingerprint}.json"

    def _unfinished(self, key: str) -> Path:
        return self.path / WRITING / f".{key}-{uuid.uuid4().hex}.part"

    def _replace(self, path: Path, key: str, data: bytes) -> None:
        self._make(self.path / WRITING)
        try:
            os.close(_plain(path, os.O_RDONLY | os.O_NONBLOCK))
        except FileNotFoundError:
            pass
        except ValueError as error:
            raise FileExistsError(errno.EEXIST, str(error), str(path)) from None
        unfinished = self._unfinished(key)
        try:
            with _locked_new(unfinished) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(unfinished, path)
        except BaseException:
            unfinished.unlink(missing_ok=True)
            raise
        sync(path.parent)

    def _make(self, folder: Path) -> None:
        """A real folder: through a link, files of others would be touched."""
        with suppress(FileExistsError):
            folder.mkdir(exist_ok=True)
        if not stat.S_ISDIR(os.lstat(folder).st_mode):
            raise FileExistsError(
                errno.EEXIST, f"'{folder.name}' is not a folder of the store", str(folder)
            )

    def _folders(self, path: Path) -> list[Path]:
        entries = (e for e in self._entries(path) if re.fullmatch(r"[0-9a-f]{2}", e.name))
        return [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False)]

    def _entries(self, path: Path) -> list[os.DirEntry]:
        """In order of their names; none if ``path`` is not a real folder."""
        try:
            if path != self.path and not stat.S_ISDIR(os.lstat(path).st_mode):
                return []
            return sorted(os.scandir(path), key=lambda entry: entry.name)
        except FileNotFoundError:
            return []


def _plain(path: Path, flags: int) -> int:
    """A descriptor of a plain file; ValueError for anything else."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        # ENXIO: a socket, or a pipe without a reader.
        if error.errno in (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENOTDIR):
            raise ValueError("a link, folder or device is at its path") from None
        raise
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return descriptor
    os.close(descriptor)
    raise ValueError("a link, folder or device is at its path")


def _locked_new(path: Path):
    """A new file, locked while its writer lives: `ChunkFolder.clean` leaves it alone."""
    while True:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        file = os.fdopen(descriptor, "wb")
        _lock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return file
        file.close()  # removed as abandoned between the two calls


def _lock(descriptor: int, how: int) -> bool | None:
    """Whether the lock was taken; None where the file system has none."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_unfinished(path: Path, old: bool) -> bool:
    if _UNFINISHED_BEFORE.fullmatch(path.name) and old:
        path.unlink()
        return True
    if not _UNFINISHED.fullmatch(path.name):
        return False
    descriptor = _plain(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        free = _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if free or (free is None and old):
            path.unlink()
            return True
        return False
    finally:
        os.close(descriptor)
