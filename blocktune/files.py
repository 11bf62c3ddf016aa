"""Atomic files: written to a temporary file in the same folder, synced, then renamed."""

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_CANNOT_SYNC = (errno.EINVAL, errno.EBADF, errno.ENOSYS, errno.ENOTSUP, errno.EACCES)


@contextmanager
def _naming(path: str | Path) -> Iterator[None]:
    """Adds the path to the error of a full disk, which names none."""
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from None


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path with the same suffix. The file written there replaces ``path``.

    An existing file keeps its permissions. If the block fails, ``path`` does not change and nothing
    is left behind. Of several processes, the last wins. Missing folders are created. For a link,
    its target is replaced. Devices and pipes are written directly.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # opening a folder will raise in the block
        with _naming(path):
            yield path
        return
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem[:32]}-{uuid.uuid4().hex}{path.suffix}")
    try:
        mode = path.stat().st_mode & 0o777 | 0o600 if path.exists() else 0o666
        temporary.touch(mode, exist_ok=False)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    usual = temporary.stat().st_mode
    try:
        with _naming(path):
            yield temporary
            with suppress(PermissionError):  # FUSE and SMB may not let permissions be set
                temporary.chmod(path.stat().st_mode if path.exists() else usual)
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def replace_text(path: str | Path, text: str) -> None:
    """Writes UTF-8 text atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def replace_json(path: str | Path, record: Any) -> None:
    """Writes indented JSON atomically. Raises ValueError for NaN, which JSON does not have."""
    replace_text(path, json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def move_folder(source: str | Path, target: str | Path) -> None:
    """Renames a finished folder to ``target``; an existing one is moved aside, then removed."""
    source, target = Path(source), Path(target)
    old = target.with_name(f".{target.name}-{os.getpid()}.old")
    if target.exists():
        os.replace(target, old)
    os.replace(source, target)
    sync(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def move_entries(source: str | Path, target: str | Path, last: str) -> None:
    """Moves a folder's entries one by one, the file ``last`` last, and removes the folder."""
    source, target = Path(source), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == last):
        if path.is_dir():
            move_folder(path, target / path.name)
        else:
            os.replace(path, target / path.name)
    source.rmdir()


def whole_lines(path: str | Path) -> list[str]:
    """The complete lines of a UTF-8 file (else ValueError); [] if it is missing or a device."""
    if not Path(path).is_file():  # reading /dev/full would never end
        return []
    text = Path(path).read_bytes()
    try:
        return text[: text.rfind(b"\n") + 1].decode("utf-8").split("\n")[:-1]
    except UnicodeDecodeError as error:
        raise ValueError(f"'{path}': not UTF-8 text, byte {error.start}; move it away") from None


def truncate_lines(path: str | Path, count: int) -> None:
    """Truncates a file after its first ``count`` lines, in place, so that a lock on it stays."""
    if Path(path).is_file():
        os.truncate(path, sum(len(line.encode()) + 1 for line in whole_lines(path)[:count]))


def append_lines(path: str | Path, lines: Iterable[str]) -> None:
    """Appends lines to a file and syncs it to disk; or writes them to a pipe or device."""
    with _naming(path), open(path, "a", encoding="utf-8") as out:
        out.writelines(line + "\n" for line in lines)
        out.flush()
        if Path(path).is_file():
            sync(path)


@contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Locks ``path`` (created if missing) in the block. ValueError if another process holds it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_char_device() or path.is_fifo():  # several processes may write to it
        yield
        return
    with path.open("a") as file:
        if lock(file.fileno()) is False:
            raise ValueError(f"another process is writing '{path}'; wait for it to end")
        yield


def lock(descriptor: int, wait: bool = False) -> bool | None:
    """Whether a file could be locked; None if its file system has no locks, as some of Lustre."""
    import fcntl  # POSIX only, unlike the rest of this module

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


@contextmanager
def alone_in(folder: str | Path, is_main: bool = True) -> Iterator[None]:
    """Locks a folder, as `locked` does, in the block of the main process of a run."""
    if not is_main:
        yield
        return
    with locked(path := Path(folder) / ".lock"):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextmanager
def resumed(path: str | Path) -> Iterator[list[str]]:
    """Locks a log of JSON lines, cuts off an incomplete last line, and yields the others.

    Raises ValueError if what is cut off cannot be the start of a line of JSON.
    """
    with locked(path):
        lines = whole_lines(path)
        if Path(path).is_file() and not _is_torn(Path(path).read_bytes().rpartition(b"\n")[2]):
            raise ValueError(f"'{path}' is not a log of this command; name another file")
        truncate_lines(path, len(lines))
        yield lines


def _is_torn(end: bytes) -> bool:
    """Whether the end of a file may be an interrupted line of JSON, or is empty."""
    try:
        json.loads(end)
    except ValueError:
        return end[:2] in (b"", b"{", b"[", b'{"', b'["')
    return False


def sync(path: str | Path) -> None:
    """Waits until a file, or the entries of a folder, are on disk, if the file system can."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
