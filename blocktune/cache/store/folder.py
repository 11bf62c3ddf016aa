"""The folder of a store: plain files under its own names, no links. No torch is imported."""

from __future__ import annotations

import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from blocktune.cache.store.blobs import MANIFESTS, Blob, Blobs, relative_path
from blocktune.files import lock, sync

WRITING = ".writing"  # folder for unfinished files, on the same file system: renames are atomic
_UNFINISHED = r"\.[0-9a-f]{64}-[0-9a-f]{32}\.part"
_ABANDONED_S = 3600
TAKEN = (errno.EEXIST, errno.ENOTDIR, errno.EISDIR, errno.ELOOP)  # by a foreign file
UNREADABLE = (errno.EACCES, errno.ESTALE)  # one file, of another user or just replaced
_FOREIGN = "a link, a device, or a file of another kind is at its path"


def chunk_path(folder: Path, key: str) -> Path:
    """Path of the file of ``key`` in ``folder``."""
    return folder / relative_path(key)


class OpenFile(Blob):
    """A plain file, held by its descriptor: its path may be replaced in the meantime."""

    data = None

    def __init__(self, descriptor: int):
        self._descriptor = descriptor
        status = os.fstat(descriptor)
        self.size = status.st_size
        self.identity = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
        self.changed, self.used = status.st_ctime, status.st_mtime

    def read_into(self, buffers: Sequence[memoryview], start: int) -> int:
        done, left = 0, [buffer for buffer in buffers if len(buffer)]
        while left and (count := os.preadv(self._descriptor, left, start + done)):
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
        super().__init__(secret)
        self.path, self.place = Path(path).absolute(), str(path)

    def prepare(self) -> None:
        """Makes a writable folder without unfinished files. Raises ValueError or OSError."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError) as error:
            reason = f"cannot use '{self.path}' as a chunk store: {error.strerror}; give a folder"
            raise ValueError(reason) from None
        probe = self._unfinished("0" * 64)
        probe.touch()
        probe.unlink(missing_ok=True)
        self.clean()

    def clean(self) -> int:
        removed = 0
        for entry in self._entries(self.path / WRITING, _UNFINISHED):
            with suppress(OSError, ValueError):  # just removed, foreign, or of another user
                age = time.time() - entry.stat(follow_symlinks=False).st_mtime
                with open(_plain(Path(entry.path), os.O_RDWR), "r+b") as file:
                    acquired = lock(file.fileno())
                    if age > _ABANDONED_S if acquired is None else acquired:
                        os.unlink(entry.path)
                        removed += 1
        return removed

    def _open(self, name: str, most: int | None) -> Blob:
        try:
            path = self._path(name)
            if most == 0:  # asks whether it is there, though perhaps only others may read it
                _require(stat.S_ISREG, path)
                return Blob(b"")
        except FileExistsError as error:
            raise ValueError(error.strerror) from None
        return OpenFile(_plain(path))

    def _write(self, name: str, data: bytes) -> None:
        path, unfinished = self._path(name, make=True), self._unfinished(Path(name).stem)
        with suppress(FileNotFoundError):
            _require(stat.S_ISREG, path)
        try:
            with _locked_new(unfinished) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
                os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        sync(path.parent)

    def _remove(self, name: str) -> None:
        (self.path / name).unlink()

    def listing(self) -> Iterator[tuple[str, int, float]]:
        for first in self._entries(self.path, "[0-9a-f]{2}"):
            for second in self._entries(Path(first.path), "[0-9a-f]{2}"):
                for entry in self._entries(Path(second.path), r"[0-9a-f]{64}\.safetensors"):
                    key = entry.name.partition(".")[0]
                    with suppress(FileNotFoundError):
                        status = entry.stat(follow_symlinks=False)
                        here = Path(entry.path) == chunk_path(self.path, key)
                        if here and stat.S_ISREG(status.st_mode):
                            yield key, status.st_size, status.st_mtime

    def touch(self, key: str) -> None:
        with suppress(OSError):
            os.utime(chunk_path(self.path, key), follow_symlinks=False)

    def _manifests(self) -> Iterator[str]:
        files = self._entries(self.path / MANIFESTS, r".*\.json")
        return (file.name.removesuffix(".json") for file in files)

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
            _require(stat.S_ISDIR, path)
        return path / last

    def _entries(self, path: Path, names: str) -> list[os.DirEntry]:
        """What a folder has under ``names``, sorted; nothing if ``path`` is not a real folder."""
        try:
            if path != self.path and not stat.S_ISDIR(os.lstat(path).st_mode):
                return []
            found = (entry for entry in os.scandir(path) if re.fullmatch(names, entry.name))
            return sorted(found, key=lambda entry: entry.name)
        except (FileNotFoundError, NotADirectoryError):
            return []


def _require(is_kind: Callable[[int], bool], path: Path) -> None:
    if not is_kind(os.lstat(path).st_mode):
        raise FileExistsError(errno.EEXIST, _FOREIGN, str(path))


def _plain(path: Path, how: int = os.O_RDONLY) -> int:
    """Opens a plain file and returns its descriptor. Raises ValueError for anything else."""
    try:
        # Without O_NONBLOCK, opening a pipe would wait for a writer.
        descriptor = os.open(path, how | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return descriptor
        os.close(descriptor)
    except OSError as error:  # ENXIO: a socket, or a pipe without a reader
        if error.errno not in (errno.ELOOP, errno.ENXIO, errno.EISDIR, errno.ENOTDIR):
            raise
    raise ValueError(_FOREIGN)


def _locked_new(path: Path):
    """Creates a file that is locked while its writer lives, so `ChunkFolder.clean` keeps it."""
    while True:
        file = path.open("xb")
        lock(file.fileno(), wait=True)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # `clean` removed it between the two calls: try again
