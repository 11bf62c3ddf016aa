"""The folder of a store: which files belong to the store, and how they are read and written.

A file belongs to the store if it is a plain file under one of the store's names in real folders.
Links are never followed, and no other file is read, replaced or removed. No torch is imported.
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

from blocktune.cache.store.blobs import MANIFESTS, Blob, Blobs, is_key, relative_path
from blocktune.files import sync

WRITING = ".writing"
"""Folder inside a store for unfinished files. It is on the same file system: renames are atomic."""
_UNFINISHED = re.compile(r"\.[0-9a-f]{64}-[0-9a-f]{32}\.part")
_ABANDONED_S = 3600
_MOST_BUFFERS = 1024
"""Buffers that one ``preadv`` call accepts."""
_TAKEN = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)


def chunk_path(folder: Path, key: str) -> Path:
    """Path of the file of ``key`` in ``folder``. Raises as `relative_path` does."""
    return folder / relative_path(key)


def is_taken(error: OSError) -> bool:
    """Whether a foreign file occupies the path, while the disk itself is writable."""
    return error.errno in _TAKEN


class OpenFile(Blob):
    """A plain file, held by its descriptor: its path may be replaced in the meantime."""

    data = None

    def __init__(self, descriptor: int):
        """Takes over the descriptor, and closes it in the end."""
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        self.changed, self.used = status.st_ctime, status.st_mtime

    def read_into(self, buffers: Sequence[memoryview], start: int) -> int:
        done, remaining = 0, [buffer for buffer in buffers if len(buffer)]
        while remaining:
            count = os.preadv(self._descriptor, remaining[:_MOST_BUFFERS], start + done)
            if not count:
                break
            done += count
            while remaining and count >= len(remaining[0]):
                count -= len(remaining.pop(0))
            if count:
                remaining[0] = remaining[0][count:]
        return done

    def __del__(self):
        os.close(self._descriptor)


class ChunkFolder(Blobs):
    """The files of a store in a folder, by their keys."""

    def __init__(self, path: str | Path, secret: bytes | None = None):
        super().__init__(secret)
        self.path, self.place = Path(path).absolute(), str(path)

    def prepare(self) -> None:
        """Makes the folder, checks that it is writable, and removes unfinished files.

        Raises ValueError if ``path`` is not a folder, OSError if it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            raise ValueError(
                f"cannot use '{self.path}' as a chunk store: {error.strerror}; give a folder"
            ) from None
        probe = self._unfinished("0" * 64)
        probe.touch()
        probe.unlink(missing_ok=True)
        self.clean()

    def clean(self) -> int:
        """Removes files of interrupted writers, not those of running ones. Returns how many."""
        removed = 0
        for entry in self._entries(self.path / WRITING):
            with suppress(OSError, ValueError):  # just removed, foreign, or of another user
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                removed += _remove_unfinished(Path(entry.path), age > _ABANDONED_S)
        return removed

    def _open(self, name: str, most: int | None) -> OpenFile:
        try:
            path = self._path(name)
        except FileExistsError as error:
            raise ValueError(error.strerror) from None
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        return OpenFile(_plain(path, os.O_RDONLY | os.O_NONBLOCK))

    def _write(self, name: str, data: bytes) -> None:
        """See `Blobs.write`. A failed write leaves nothing behind; `is_taken` tells its cause."""
        path, unfinished = self._path(name, make=True), self._unfinished(Path(name).stem)
        try:
            os.close(_plain(path, os.O_RDONLY | os.O_NONBLOCK))
        except FileNotFoundError:
            pass
        except ValueError as error:
            raise FileExistsError(errno.EEXIST, str(error), str(path)) from None
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

    def _remove(self, name: str) -> None:
        (self.path / name).unlink()

    def listing(self) -> Iterator[tuple[str, int, float]]:
        for first in self._folders(self.path):
            for second in self._folders(first):
                for entry in self._entries(second):
                    key, _, suffix = entry.name.partition(".")
                    if suffix != "safetensors" or not is_key(key):
                        continue
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        here = Path(entry.path) == chunk_path(self.path, key)
                        if here and stat.S_ISREG(status.st_mode):
                            yield key, status.st_size, status.st_mtime

    def touch(self, key: str) -> None:
        """Updates the modification time of the file of ``key`` (`Blob.used`), if permitted."""
        with suppress(OSError):
            os.utime(chunk_path(self.path, key), follow_symlinks=False)

    def _manifests(self) -> Iterator[str]:
        return (file.name.removesuffix(".json") for file in self._entries(self.path / MANIFESTS))

    def _unfinished(self, stem: str) -> Path:
        return self._path(f"{WRITING}/.{stem}-{uuid.uuid4().hex}.part", make=True)

    def _path(self, name: str, make: bool = False) -> Path:
        """The path of ``name``. No folder on it may be a link, which could lead anywhere."""
        *folders, last = name.split("/")
        path = self.path
        for folder in folders:
            path = path / folder
            if make:
                with suppress(FileExistsError):
                    path.mkdir(exist_ok=True)
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                reason = f"'{path}' is not a folder of the store"
                raise FileExistsError(errno.EEXIST, reason, str(path))
        return path / last

    def _folders(self, path: Path) -> list[Path]:
        entries = (e for e in self._entries(path) if re.fullmatch(r"[0-9a-f]{2}", e.name))
        return [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False)]

    def _entries(self, path: Path) -> list[os.DirEntry]:
        """Lists a folder, sorted by name; empty if ``path`` is not a real folder."""
        try:
            if path != self.path and not stat.S_ISDIR(os.lstat(path).st_mode):
                return []
            return sorted(os.scandir(path), key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return []


def _plain(path: Path, flags: int) -> int:
    """Opens a plain file and returns its descriptor. Raises ValueError for anything else."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:
        # ENXIO: the path is a socket, or a pipe without a reader.
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENOTDIR):
            raise
    raise ValueError("a link, folder or device is at its path")


def _locked_new(path: Path):
    """Creates a file that is locked while its writer lives, so `ChunkFolder.clean` keeps it."""
    while True:
        file = path.open("xb")
        _lock(file.fileno(), fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # `clean` removed it between the two calls: try again


def _lock(descriptor: int, how: int) -> bool | None:
    """Whether the lock was acquired; None if the file system does not support locks."""
    try:
        fcntl.flock(descriptor, how)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _remove_unfinished(path: Path, old: bool) -> bool:
    if not _UNFINISHED.fullmatch(path.name):
        return False
    descriptor = _plain(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        acquired = _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        abandoned = old if acquired is None else acquired
        if abandoned:
            path.unlink()
        return abandoned
    finally:
        os.close(descriptor)
