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

from blocktune.cache.blobs import MANIFESTS, Blob, Blobs, is_key, relative_path
from blocktune.files import sync

WRITING = ".writing"
"""Folder inside a store for unfinished files: the same file system, so renaming is atomic."""
_UNFINISHED = re.compile(r"\.[0-9a-f]{64}-[0-9a-f]{32}\.part")
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

    data = None

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

    def _open(self, name: str, most: int | None) -> OpenFile:
        try:
            path = self._path(name)
        except FileExistsError as error:
            raise ValueError(error.strerror) from None
        # Without O_NONBLOCK a pipe would wait for a writer.
        return OpenFile(_plain(path, os.O_RDONLY | os.O_NONBLOCK))

    def _write(self, name: str, data: bytes) -> None:
        """Writes a file so that readers see the old one, none, or the whole new one.

        Several processes may write the same one at once: the last one stays. If the disk refuses,
        nothing is left behind; `is_taken` says whether something foreign is at the file's path.
        """
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
        (self.path / name).unlink(missing_ok=True)

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
        """Notes that the file of ``key`` was used, where the disk lets us: `Blob.used`."""
        with suppress(OSError):
            os.utime(chunk_path(self.path, key), follow_symlinks=False)

    def _manifests(self) -> Iterator[str]:
        return (one.name.removesuffix(".json") for one in self._entries(self.path / MANIFESTS))

    def _unfinished(self, stem: str) -> Path:
        return self._path(f"{WRITING}/.{stem}-{uuid.uuid4().hex}.part", make=True)

    def _path(self, name: str, make: bool = False) -> Path:
        """Of a file in real folders: through a link, files of others would be touched."""
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
        file = path.open("xb")
        _lock(file.fileno(), fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
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
    if not _UNFINISHED.fullmatch(path.name):
        return False
    descriptor = _plain(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        free = _lock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        abandoned = old if free is None else free
        if abandoned:
            path.unlink()
        return abandoned
    finally:
        os.close(descriptor)
