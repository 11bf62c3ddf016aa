"""Remote stores that machines share: any fsspec URL, with a folder's names, or Valkey (Redis)."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import parse_qsl, urlencode, urlsplit, urlunsplit

from blocktune.cache.store.blobs import MANIFESTS, Blob, Blobs, is_key, relative_path
from blocktune.cache.store.config import without_password
from blocktune.files import replacing

TIMEOUT_S = 2.0  # default limit on one request; an answer can do without what is slower
SLOWEST = 1e6  # bytes per second that a write may take in addition
VALKEY = ("valkey", "valkeys", "redis", "rediss", "unix")
PREFIX = "blocktune"
_DATES = ("LastModified", "last_modified", "mtime", "updated", "modified", "created")


def open_remote(url: str, secret: bytes | None = None, wait: float | None = None) -> Blobs:
    """Opens ``valkey://HOST:PORT/DB?prefix=NAME`` or a URL that fsspec opens, such as ``s3://``.

    It connects at the first use; a request waits ``wait`` seconds. ValueError: it cannot be opened.
    """
    try:
        cls = ValkeyBlobs if urlsplit(url).scheme in VALKEY else FsspecBlobs
        return cls(url, secret, TIMEOUT_S if wait is None else wait)
    except ImportError as error:
        hint = f"it needs the package '{error.name}'; `pip install 'blocktune[remote]'`"
        reason = hint if error.name else error  # fsspec names the package of other places
        raise ValueError(f"cannot open '{without_password(url)}': {reason}") from None


def _call_client(call: Callable, *args, **kwargs) -> Any:
    """Calls a client and turns its errors into OSError; FileNotFoundError stays."""
    try:
        return call(*args, **kwargs)
    except ImportError:
        raise
    except OSError as error:
        if str(error):
            raise
        reason = f"no answer in time ({type(error).__name__}); `--store ...,wait=30s` waits longer"
        raise OSError(reason) from None
    except Exception as error:  # each client library has its own error types
        raise OSError(f"{type(error).__name__}: {error}") from None


class FsspecBlobs(Blobs):
    """Files below an fsspec URL. Credentials come from the file system's usual configuration."""

    def __init__(self, url: str, secret: bytes | None, timeout_s: float):
        import fsspec

        super().__init__(secret)
        self.place, self.timeout_s = without_password(url).rstrip("/"), timeout_s
        options = {"use_listings_cache": False, "skip_instance_cache": True}
        if urlsplit(url).scheme in ("s3", "s3a"):
            times = {"connect_timeout": timeout_s, "read_timeout": timeout_s}
            own = fsspec.config.conf.get("s3", {}).get("config_kwargs", {})
            options["config_kwargs"] = times | {"retries": {"max_attempts": 1}} | own
        self._clients: dict[int, Any] = {}  # by process
        self._connect = partial(fsspec.core.url_to_fs, url, **options)
        try:
            self._root = re.sub("(?<!:)//+", "/", self._connect()[1])  # as listings name it
        except ValueError as error:
            hint = "give a folder, valkey://HOST:PORT/DB or a URL of fsspec, as s3://BUCKET/PREFIX"
            raise ValueError(f"cannot open a store there ({error}); {hint}") from None
        self._async = getattr(self._fs, "async_impl", False)

    @property
    def _fs(self) -> Any:
        # A fork lacks the threads of its parent's client, and must not close its connections.
        if os.getpid() not in self._clients:
            self._clients[os.getpid()] = self._connect()[0]
        return self._clients[os.getpid()]

    def _open(self, name: str, most: int | None) -> Blob:
        path = self._path(name)
        if most is None:
            return Blob(self._call("cat_file", path))
        size, used = _size_and_date(self._call("info", path))
        end = min(most, size)
        return Blob(self._call("cat_file", path, start=0, end=end) if end else b"", size, used)

    def _write(self, name: str, data: bytes) -> None:
        path = self._path(name)
        if "file" in self._fs.protocol:  # unlike an object store's, its writes are not atomic
            with replacing(path) as temporary:
                temporary.write_bytes(data)
            return
        if not self._async:
            _call_client(self._fs.makedirs, self._fs._parent(path), exist_ok=True)
        self._call("pipe_file", path, data, timeout_s=self.timeout_s + len(data) / SLOWEST)

    def _remove(self, name: str) -> None:
        self._call("rm_file", self._path(name))

    def listing(self) -> list[tuple[str, int, float]]:
        found = []
        for name, info in sorted(_call_client(self._fs.find, self._root, detail=True).items()):
            key = PurePosixPath(name).stem  # not one of another store in a folder below
            if is_key(key) and name.strip("/") == self._path(relative_path(key)).strip("/"):
                found.append((key, *_size_and_date(info)))
        return found

    def _manifests(self) -> Iterable[str]:
        names = _call_client(self._fs.find, self._path(MANIFESTS))  # none if there is no folder
        return (PurePosixPath(name).stem for name in names)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    def _call(self, name: str, *args, timeout_s: float | None = None, **kwargs) -> Any:
        if not self._async:
            return _call_client(getattr(self._fs, name), *args, **kwargs)
        from fsspec.asyn import sync

        call, limit = getattr(self._fs, f"_{name}"), timeout_s or self.timeout_s
        return _call_client(sync, self._fs.loop, call, *args, timeout=limit, **kwargs)


def _size_and_date(info: dict[str, Any]) -> tuple[int, float]:
    # Without a known date it counts as just used, so that `gc --unused-days` does not remove it.
    date = next((info[name] for name in _DATES if info.get(name)), time.time())
    if isinstance(date, str):
        date = datetime.fromisoformat(date)
    return int(info["size"] or 0), date.timestamp() if isinstance(date, datetime) else float(date)


class ValkeyBlobs(Blobs):
    """Values of a Valkey or Redis server, under ``PREFIX:KEY`` and ``PREFIX:manifest:MODEL``."""

    def __init__(self, url: str, secret: bytes | None, timeout_s: float):
        import valkey

        super().__init__(secret)
        parts, self.place = urlsplit(url), without_password(url)
        options = dict(parse_qsl(parts.query))
        self._prefix = options.pop("prefix", PREFIX)
        if parts.scheme != "unix" and not re.fullmatch("/?[0-9]*", parts.path):
            hint = "name a store by ?prefix=NAME, and write a / in a password as %2F"
            raise ValueError(f"{parts.scheme}://HOST/N numbers a database; {hint}")
        try:
            self._client = valkey.from_url(
                urlunsplit(parts._replace(query=urlencode(options))),
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
            )
            pool = self._client.connection_pool
            pool.connection_class(**pool.connection_kwargs)  # knows its options, does not connect
        except (ValueError, TypeError, valkey.ValkeyError) as error:
            raise ValueError(f"'{self.place}': {error}") from None

    def name(self, key: str) -> str:
        return f"{self.place} {self._key(relative_path(key))}"

    def _open(self, name: str, most: int | None) -> Blob:
        key = self._key(name)
        if most is None:
            data = _call_client(self._client.get, key)
            if data is None:
                raise FileNotFoundError(key)
            return Blob(data, used=time.time())
        [(data, size, idle)] = _call_client(self._peek, [key], max(most, 1))
        if not isinstance(data, bytes):
            raise OSError(str(data))
        if not data:
            raise FileNotFoundError(key)
        return Blob(data, size, time.time() - idle)

    def _write(self, name: str, data: bytes) -> None:
        _call_client(self._client.set, self._key(name), data)

    def _remove(self, name: str) -> None:
        _call_client(self._client.delete, self._key(name))

    def touch(self, key: str) -> None:
        with suppress(OSError):
            _call_client(self._client.touch, self._key(relative_path(key)))

    def listing(self) -> list[tuple[str, int, float]]:
        now, keys = time.time(), sorted(filter(is_key, self._names("")))
        found = _call_client(self._peek, [f"{self._prefix}:{key}" for key in keys])
        return [(key, size, now - idle) for key, (_, size, idle) in zip(keys, found, strict=True)]

    def _manifests(self) -> Iterable[str]:
        return self._names("manifest:")

    def _names(self, kind: str) -> list[str]:
        start = f"{self._prefix}:{kind}"
        pattern = re.sub(r"([\\*?\[\]])", r"\\\1", start) + "*"
        names = _call_client(lambda: list(self._client.scan_iter(pattern, count=1000)))
        return [name.decode(errors="replace").removeprefix(start) for name in set(names)]

    def _peek(self, names: Sequence[str], most: int = 1) -> list[tuple[bytes, int, int]]:
        """First ``most`` bytes, size and idle seconds of values, without counting as a use."""
        pipe = self._client.pipeline(transaction=False)
        pipe.client_no_touch("ON")  # unknown to Redis before 7.2, where it does count
        for name in names:
            pipe.object("IDLETIME", name).strlen(name).getrange(name, 0, most - 1)
        pipe.client_no_touch("OFF")
        replies = iter(pipe.execute(raise_on_error=False)[1:-1])
        found = zip(replies, replies, replies, strict=True)
        number = lambda reply: reply if isinstance(reply, int) else 0  # noqa: E731
        return [(data, number(size), number(idle)) for idle, size, data in found]

    def _key(self, name: str) -> str:
        kind = "manifest:" if name.startswith(f"{MANIFESTS}/") else ""
        return f"{self._prefix}:{kind}{PurePosixPath(name).stem}"
