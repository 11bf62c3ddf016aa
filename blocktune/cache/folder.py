"""The folder of a store: which of its files are the store's, and how those are read and written.

A file is the store's if it is a plain file under a name of ours in real folders. Links are never
followed, and nothing else is read, replaced or removed. No torch: listing needs no model.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from blocktune.cache.blobs import MANIFESTS, Blob, Blobs, Head, is_key, relative_path
from blocktune.files import sync

WRITING = ".writing"
"""Folder inside a store for unfinished files: the same file system, so renaming is atomic."""
_UNFINISHED = re.compile(r"\.[0-9a-f]{64}-[0-9a-f]{32}\.part")
_UNFINISHED_BEFORE = re.compile(r"\.[0-9a-f]{64}-[a-z0-9_]{8}\.safetensors")  # of older versions
_ABANDONED_S = 3600
_MOST_BUFFERS = 1024
"""Of one call."""
_TAKEN = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def chunk_path(folder: Path, key: str) -> Path:
    """Where a folder has the file of ``key``; raises as `relative_path` does."""
    return folder / relative_path(key)


def is_taken(error: OSError) -> bool:
    """Whether something foreign occupies one path; the disk as a whole can be written."""
    return error.errno in _TAKEN


class OpenFile(Blob):
    """A plain file, by its descriptor: its path may become something else meanwhile."""

    def __init__(self, descriptor: int):
        """Owns the descriptor."""
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        self.changed, self.used = status.st_ctime, status.st_mtime

    def read_into(self, buffers: Sequence[memoryview], start: int) -> int:
        done, left = 0, [buffer for buffer in buffers if len(buffer)]
        while left:
            count = os.preadv(self._descriptor, left[:_MOST_BUFFERS], start + done)
            if not count:
                break
            done += count
            while left and count >= len(left[0]):
                count -= len(left.pop(0))
            if count:
                left[0] = left[0][count:]
        return done

    def __del__(self):
        os.close(self._descriptor)


class ChunkFolder(Blobs):
    """The files of a store in a folder, by their keys."""

    def __init__(self, path: str | Path, secret: bytes | None = None):
        """Of the folder ``path``; ``secret`` as in `Blobs`."""
        super().__init__(secret)
        self.path, self.place = Path(path), str(path)

    def prepare(self) -> None:
        """Makes the folder, checks that it can be written, removes unfinished files.

        ValueError if something other than a folder is there, OSError if it cannot be written.
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
        """Removes what stopped writers left, nothing that a running one needs; how many files."""
        removed = 0
        for entry in self._entries(self.path / WRITING):
            with suppress(OSError, ValueError):  # gone meanwhile, or another user's
                if entry.is_file(follow_symlinks=False):
                    age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                    removed += _remove_unfinished(Path(entry.path), age > _ABANDONED_S)
        return removed

    def open(self, key: str) -> OpenFile:
        """See `Blobs.open`; a link, a folder or a pipe is something else."""
        path = chunk_path(self.path, key)
        for parent in (path.parent.parent, path.parent):
            if not stat.S_ISDIR(os.lstat(parent).st_mode):
                raise ValueError(f"'{parent}' is not a folder of the store")
        # Without O_NONBLOCK a pipe would wait for a writer.
        return OpenFile(_plain(path, os.O_RDONLY | os.O_NONBLOCK))

    def head(self, key: str, length: int) -> Head:
        file = self.open(key)
        data = bytearray(min(length, file.size))
        count = file.read_into([memoryview(data)], 0)
        return Head(bytes(data[:count]), file.size, file.used)

    def write(self, key: str, data: bytes) -> None:
        """Writes a file so that readers see the old one, none, or the whole new one.

        Several processes may write the same key at once: the last one stays. If the disk refuses,
        nothing is left behind; `is_taken` says whether something foreign is at the file's path.
        """
        path = chunk_path(self.path, key)
        self._make(path.parent.parent)
        self._make(path.parent)
        self._replace(path, key, data)

    def remove(self, key: str) -> bool:
        try:
            self.open(key)
        except (FileNotFoundError, ValueError):
            return False
        chunk_path(self.path, key).unlink(missing_ok=True)
        return True

    def has(self, key: str) -> bool:
        """Whether there is a file of ``key``; not verified."""
        try:
            self.open(key)
        except (OSError, ValueError):
            return False
        return True

    def keys(self) -> Iterator[str]:
        """Keys of all files, in order."""
        for first in self._folders(self.path):
            for second in self._folders(first):
                for entry in self._entries(second):
                    key, _, suffix = entry.name.partition(".")
                    named = suffix == "safetensors" and is_key(key)
                    here = named and Path(entry.path) == chunk_path(self.path, key)
                    if here and entry.is_file(follow_symlinks=False):
                        yield key

    def touch(self, key: str) -> None:
        """Notes that the file of ``key`` was used, where the disk lets us: `FileFacts.used`."""
        with suppress(OSError):
            os.utime(chunk_path(self.path, key), follow_symlinks=False)

    def fingerprints(self) -> list[str]:
        names = (entry.name.removesuffix(".json") for entry in self._entries(self.path / MANIFESTS))
        return sorted(filter(is_key, names))

    def _read_manifest(self, fingerprint: str) -> bytes:
        path = self.path / MANIFESTS / f"{fingerprint}.json"
        with os.fdopen(_plain(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            return file.read()

    def _write_manifest(self, fingerprint: str, data: bytes) -> None:
        self._make(self.path / MANIFESTS)
        self._replace(self.path / MANIFESTS / f"{fingerprint}.json", fingerprint, data)

    def is_store(self) -> bool:
        """Whether a store was opened here before."""
        return (self.path / WRITING).is_dir()

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
        except (FileNotFoundError, NotADirectoryError):
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
