"""Chunks that machines share: a bucket or any other place that fsspec reaches, or Valkey (Redis).

Files have the names that they have in a folder, so a synchronised copy of a folder is a remote.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit, urlunsplit

from blocktune.cache.blobs import MANIFESTS, Blobs, Bytes, Head, is_key, relative_path

TIMEOUT_S = 2.0  # seconds that a remote may take to answer
VALKEY = ("valkey", "valkeys", "redis", "rediss", "unix")
PREFIX = "blocktune"


def open_remote(url: str, secret: bytes | None = None, timeout_s: float | None = None) -> Blobs:
    """The files at a URL; connects when they are used.

    ``valkey://HOST:PORT/DB`` (with ``?prefix=NAME``; default ``blocktune``) or whatever fsspec
    opens: ``s3://BUCKET/PREFIX``, ``gs://...``, ``file:///...``. ValueError if the URL is wrong,
    or the package that opens it is missing.
    """
    scheme = urlsplit(url).scheme
    try:
        remote = ValkeyBlobs if scheme in VALKEY else FsspecBlobs
        return remote(url, secret, TIMEOUT_S if timeout_s is None else timeout_s)
    except ImportError as error:
        raise ValueError(
            f"'{url}' needs the package '{error.name or error}'; `pip install 'blocktune[remote]'`"
        ) from None


def _reached(call: Callable, *args, **kwargs) -> Any:
    """OSError for whatever a client raises; missing files stay FileNotFoundError."""
    try:
        return call(*args, **kwargs)
    except (OSError, ImportError):
        raise
    except Exception as error:  # clients have error types of their own
        raise OSError(f"{type(error).__name__}: {error}") from None


class FsspecBlobs(Blobs):
    """Files below a URL of fsspec; the credentials are those of its file system."""

    def __init__(self, url: str, secret: bytes | None, timeout_s: float):
        """See `open_remote`."""
        import fsspec

        super().__init__(secret)
        self.place, self.timeout_s = url.rstrip("/"), timeout_s
        options = {}
        if urlsplit(url).scheme in ("s3", "s3a"):
            times = {"connect_timeout": timeout_s, "read_timeout": timeout_s}
            options["config_kwargs"] = times | {"retries": {"max_attempts": 1}}
        options |= {"use_listings_cache": False, "skip_instance_cache": True}
        try:
            self._fs, self._root = fsspec.core.url_to_fs(url, **options)
        except ValueError as error:
            raise ValueError(
                f"no store opens there ({error}); name a folder, valkey://HOST:PORT/DB or what "
                "fsspec opens, such as s3://BUCKET/PREFIX"
            ) from None
        self._async = getattr(self._fs, "async_impl", False)

    def open(self, key: str) -> Bytes:
        return Bytes(self._call("cat_file", self._path(relative_path(key))))

    def head(self, key: str, length: int) -> Head:
        path = self._path(relative_path(key))
        size, used = _told(self._call("info", path))
        return Head(self._call("cat_file", path, start=0, end=min(length, size)), size, used)

    def write(self, key: str, data: bytes) -> None:
        self._write(self._path(relative_path(key)), data)

    def remove(self, key: str) -> bool:
        if not self.has(key):
            return False
        self._call("rm_file", self._path(relative_path(key)))
        return True

    def has(self, key: str) -> bool:
        try:
            self._call("info", self._path(relative_path(key)))
        except OSError:
            return False
        return True

    def keys(self) -> Iterator[str]:
        yield from (key for key, _, _ in self.listing())

    def listing(self) -> list[tuple[str, int, float]]:
        """Key, size and date of every file, in one listing."""
        found = _reached(self._fs.find, self._root, detail=True)
        names = ((PurePosixPath(name), info) for name, info in sorted(found.items()))
        return [
            (name.stem, *_told(info))
            for name, info in names
            if name.suffix == ".safetensors"
            and is_key(name.stem)
            and name.as_posix().endswith(relative_path(name.stem))
        ]

    def fingerprints(self) -> list[str]:
        try:
            names = _reached(self._fs.ls, self._path(MANIFESTS), detail=False)
        except FileNotFoundError:
            return []
        return sorted(filter(is_key, (PurePosixPath(name).stem for name in names)))

    def _read_manifest(self, fingerprint: str) -> bytes:
        return self._call("cat_file", self._path(f"{MANIFESTS}/{fingerprint}.json"))

    def _write_manifest(self, fingerprint: str, data: bytes) -> None:
        self._write(self._path(f"{MANIFESTS}/{fingerprint}.json"), data)

    def _write(self, path: str, data: bytes) -> None:
        if not self._async:
            _reached(self._fs.makedirs, self._fs._parent(path), exist_ok=True)
        self._call("pipe_file", path, data)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _call(self, name: str, *args, **kwargs) -> Any:
        if not self._async:
            return _reached(getattr(self._fs, name), *args, **kwargs)
        from fsspec.asyn import sync

        call = getattr(self._fs, f"_{name}")
        return _reached(sync, self._fs.loop, call, *args, timeout=self.timeout_s, **kwargs)


def _told(info: dict[str, Any]) -> tuple[int, float]:
    date = next((info[n] for n in ("LastModified", "mtime", "updated") if n in info), 0.0)
    if isinstance(date, str):
        date = datetime.fromisoformat(date)
    return int(info["size"]), date.timestamp() if isinstance(date, datetime) else float(date)


class ValkeyBlobs(Blobs):
    """Values of a Valkey or Redis server, under ``PREFIX:KEY`` and ``PREFIX:manifest:MODEL``."""

    def __init__(self, url: str, secret: bytes | None, timeout_s: float):
        """See `open_remote`."""
        import valkey

        super().__init__(secret)
        parts = urlsplit(url)
        self._prefix = parse_qs(parts.query).get("prefix", [PREFIX])[0]
        self.place = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
        try:
            self._client = valkey.from_url(
                urlunsplit(parts._replace(query="")),
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
            )
        except ValueError as error:
            raise ValueError(f"'{self.place}': {error}") from None

    def name(self, key: str) -> str:
        return f"{self.place} {self._key(key)}"

    def open(self, key: str) -> Bytes:
        return Bytes(self._get(self._key(key)))

    def head(self, key: str, length: int) -> Head:
        name = self._key(key)
        data = _reached(self._client.getrange, name, 0, length - 1)
        if not data:
            raise FileNotFoundError(name)
        size, idle = _reached(self._sizes, [name])[0]
        return Head(data, size, time.time() - idle)

    def write(self, key: str, data: bytes) -> None:
        _reached(self._client.set, self._key(key), data)

    def remove(self, key: str) -> bool:
        return bool(_reached(self._client.delete, self._key(key)))

    def has(self, key: str) -> bool:
        try:
            return bool(_reached(self._client.exists, self._key(key)))
        except OSError:
            return False

    def keys(self) -> Iterator[str]:
        yield from (key for key, _, _ in self.listing())

    def listing(self) -> list[tuple[str, int, float]]:
        """Key, size and date of last use of every value."""
        now, keys = time.time(), sorted(filter(is_key, self._names("")))
        told = _reached(self._sizes, [self._key(key) for key in keys])
        return [(key, size, now - idle) for key, (size, idle) in zip(keys, told, strict=True)]

    def fingerprints(self) -> list[str]:
        return sorted(filter(is_key, self._names("manifest:")))

    def _read_manifest(self, fingerprint: str) -> bytes:
        return self._get(f"{self._prefix}:manifest:{fingerprint}")

    def _write_manifest(self, fingerprint: str, data: bytes) -> None:
        _reached(self._client.set, f"{self._prefix}:manifest:{fingerprint}", data)

    def _get(self, name: str) -> bytes:
        data = _reached(self._client.get, name)
        if data is None:
            raise FileNotFoundError(name)
        return data

    def _names(self, kind: str) -> list[str]:
        start = f"{self._prefix}:{kind}"
        found = _reached(lambda: list(self._client.scan_iter(f"{start}*", count=1000)))
        return [name.decode(errors="replace").removeprefix(start) for name in set(found)]

    def _sizes(self, names: Sequence[str]) -> list[tuple[int, int]]:
        pipe = self._client.pipeline(transaction=False)
        for name in names:
            pipe.strlen(name)
            pipe.object("IDLETIME", name)
        found = pipe.execute(raise_on_error=False)
        numbers = [one if isinstance(one, int) else 0 for one in found]
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def _key(self, key: str) -> str:
        relative_path(key)  # checks it
        return f"{self._prefix}:{key}"
