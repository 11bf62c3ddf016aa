"""A store's configuration (``--store``), counters and trace of uses. No torch is imported."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, BinaryIO, Literal, Self

from blocktune.registry import require_one_of

POLICIES = {
    "lru": "used",
    "lfu": "uses",
    "fifo": "created",
    "gdsf": "clock + uses * seconds * 1e9 / size",
}
"""Worth of an entry as SQL over its columns. The least is evicted first; ties: the oldest use.

``gdsf``: seconds of encoding saved per byte (Cherkasova, Greedy-Dual-Size-Frequency, HPL-98-69R1).
``clock``, the worth of the last evicted entry at the time of use, makes old uses count less.
"""
CODECS = ("as-is", "fp8", "int8", "int4")
MEMORY = 4 << 30
Tier = Literal["memory", "cpu", "disk", "remote", "none"]
_REMEMBERED, _SHOWN = 1 << 16, 16  # keys whose last use a trace remembers; digits of one in it
_LOG = logging.getLogger(__name__)
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class About:
    """Metadata of an entry, besides its key and size."""

    num_tokens: int = 0
    kind: str = ""
    fingerprint: str = ""  # of the model that made it
    document: str = ""  # documents that the chunk comes from, as the user names them, one a line
    tenant: str = ""  # owner, whose quota it counts against
    seconds: float = 0.0  # time that encoding took: what a hit saves
    expires: float | None = None  # end of its lifetime, seconds since the epoch; None: never


@dataclass(frozen=True)
class Row(About):
    """An entry's row in the ledger. Times are seconds since the epoch."""

    key: str = ""
    size: int = 0
    created: float = 0.0
    used: float = 0.0
    uses: int = 0
    pinned: bool = False

    @classmethod
    def of(
        cls, header: Mapping[str, str], num_tokens: int, key: str, size: int, used: float
    ) -> Self:
        """The row of a file, from its header. ValueError: a damaged one."""
        seconds, expires = (float(header.get(name, 0.0)) for name in ("seconds", "expires"))
        texts = (header.get(n, "") for n in ("kind", "fingerprint", "document", "tenant"))
        return cls(num_tokens, *texts, seconds, expires or None, key, size, used, used, 1)


def parse_bytes(text: str) -> int:
    """Parses a size such as ``50GB`` or ``50GiB`` into bytes."""
    number = r"([0-9]{1,15}(?:\.[0-9]+)?)"  # so that any size fits a float
    match = re.fullmatch(rf"{number} *(?:([kmgt])(i?))?b?", text.strip().lower())
    if not match:
        wanted = "a number of up to 15 digits with kB, MB, GB or TB (or GiB)"
        raise ValueError(f"a size is {wanted}, got '{text:.60}'")
    return int(float(match[1]) * (1024 if match[3] else 1000) ** " kmgt".index(match[2] or " "))


def parse_seconds(text: str) -> float:
    """Parses a duration such as ``30d`` into seconds."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([smhd]?)", text.strip().lower())
    if not match:
        raise ValueError(f"a time is a number with s, m, h or d, got '{text}'")
    return float(match[1]) * _SECONDS[match[2]]


@dataclass(frozen=True)
class StoreConfig:
    """Tiers of a store and their limits in bytes. Raises ValueError if a value is out of range."""

    folder: Path | None = None  # holds the files; None: nothing on disk
    remote: str | None = None  # URL that machines share, see `open_remote`; None: no remote
    memory: int = MEMORY  # limit on the model's device
    cpu: int = 0  # limit in host memory, for entries evicted from the device
    disk: int | None = None  # limit of the folder; None: no limit
    remote_bytes: int | None = None  # limit of the remote; None: no limit
    wait: float | None = None  # seconds that a lookup waits for the remote; None: 2
    policy: str | None = None  # one of `POLICIES`; None: the one the folder was last opened with
    quota: int | None = None  # limit of one tenant in each tier
    ttl: float | None = None  # seconds after which a chunk is encoded again
    codec: str = "as-is"  # how files hold keys and values, one of `CODECS`
    press: str | None = None  # ``NAME:RATIO`` of kvpress, which prunes chunks before they are kept
    trace: Path | None = None  # file that gets a JSON line for every lookup and write

    def __post_init__(self):
        if re.match("[a-z0-9]{2,}:/", str(self.folder)):
            raise ValueError(f"'{self.folder}' is a URL, not a folder; use `ChunkStore.open`")
        if self.folder is not None:
            object.__setattr__(self, "folder", Path(os.path.expanduser(self.folder)))
        if self.memory + self.cpu == 0 and self.place is None:
            raise ValueError("a chunk store needs memory or a folder; got 0 bytes, folder None")
        for name in ("memory", "cpu", "disk", "remote_bytes", "quota"):
            if (size := getattr(self, name)) is not None and size < 0:
                raise ValueError(f"{name} is a number of bytes, 0 or more; got {size}")
        for name in ("ttl", "wait"):
            if (seconds := getattr(self, name)) is not None and seconds <= 0:
                raise ValueError(f"{name} must be more than 0 seconds, got {seconds}")
        for name, known in (("policy", POLICIES), ("codec", CODECS)):
            if getattr(self, name) is not None:
                require_one_of(name, getattr(self, name), known)

    @property
    def place(self) -> str | None:
        """The folder; if there is none, the URL without its password. Error messages name it."""
        if self.folder is not None:
            return str(self.folder)
        return None if self.remote is None else without_password(self.remote)

    @classmethod
    def parse(cls, text: str | Path, **defaults) -> StoreConfig:
        """Reads ``PLACE,name=value,...``: a folder or a URL, then limits.

        Examples: ``chunks/,disk=50GB``, ``s3://bucket/chunks``, ``memory=2GB,codec=fp8``. The name
        of an existing folder may contain commas and ``=``. Raises ValueError for anything else.
        """
        known = {field.name for field in fields(cls)} - {"folder"}
        if isinstance(text, Path) or (text and Path(text).is_dir()):  # Path("") is the current one
            return cls(**defaults | {"folder": Path(text)})
        first, *rest = text.split(",")
        values = dict(defaults)
        if "=" in first.partition("://")[0]:
            rest = [first, *rest]
        elif first:
            values |= {"remote": first} if "://" in first else {"folder": Path(first)}
        for pair in rest:
            name, equals, value = (part.strip() for part in pair.partition("="))
            if not equals or not value or name not in known:
                raise ValueError(
                    f"--store is PLACE,name=value,... with {', '.join(sorted(known))}; got '{pair}'"
                )
            if name in values and name not in defaults:
                raise ValueError(f"--store: '{name}' is given twice; give it once")
            values[name] = _READ.get(name, str)(value)
        return cls(**values)


_READ = dict.fromkeys(("memory", "cpu", "disk", "remote_bytes", "quota"), parse_bytes)
_READ |= {"ttl": parse_seconds, "wait": parse_seconds, "trace": Path}


def without_password(url: str) -> str:
    """The URL without user and password, for messages."""
    return re.sub("://[^/?#]*@", "://", re.sub("password=[^&]*&?", "", url))


def keep_latest(known: dict, key: Hashable, value: Any, most: int) -> None:
    """Sets ``known[key]`` and drops the oldest beyond ``most``: clients may send any number."""
    known.pop(key, None)
    known[key] = value
    while len(known) > most:
        del known[next(iter(known))]


@dataclass
class TierStats:
    """Counters of one tier since the store was opened."""

    hits: int = 0
    misses: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    read_s: float = 0.0
    write_s: float = 0.0
    evictions: int = 0
    expired: int = 0  # entries past their lifetime; counted as misses, too
    unwritten: int = 0  # entries that could not be stored
    failures: int = 0  # requests that failed because the tier was out of reach


@dataclass
class StoreStats:
    """Counters since the store was opened."""

    misses: int = 0
    rejected: int = 0  # misses where an entry was damaged, forged or of other tokens or models
    first_rejected: str = ""  # reason of the first rejection
    memory_bytes: int = 0
    tiers: dict[str, TierStats] = field(default_factory=dict)

    @property
    def files(self) -> TierStats:
        """Sum of the counters of the folder and the remote."""
        counters = (astuple(self.tiers[name]) for name in ("disk", "remote") if name in self.tiers)
        return TierStats(*map(sum, zip(*counters, strict=True)))


class Tracer:
    """Counts lookups. With a path, it also appends lookups and writes to a JSON Lines file.

    Lines: ``{"t", "op": "get" or "put", "key", "tokens", "bytes", "tier" or "seconds", ...}``, with
    ``t`` in seconds since the epoch. Processes may share the file.
    """

    def __init__(self, path: Path | None = None):
        self._file: BinaryIO | None = None
        self._count, self._last = 0, OrderedDict()  # a dict is slow to drop its oldest key
        self._distances, self._lifetimes = Counter(), Counter()
        if path is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._file = path.open("ab", buffering=0)
            except OSError as error:
                raise ValueError(f"cannot write the trace '{path}': {error.strerror}") from None

    def looked_up(self, key: str, tokens: int, tier: str, num_bytes: int, seconds: float) -> None:
        """Records a lookup that took ``seconds``; ``tier`` is ``"none"`` for a miss."""
        self._count += 1
        now, last = time.monotonic(), self._last.get(key)
        if last is not None:
            self._distances[(self._count - last[0]).bit_length() - 1] += 1
            self._lifetimes[int(now - last[1]).bit_length()] += 1
        keep_latest(self._last, key, (self._count, last[1] if last else now), _REMEMBERED)
        if self._file is not None:  # only then build the record: lookups must stay short
            self._write("get", key, tokens=tokens, bytes=num_bytes, tier=tier, load_s=seconds)

    def put(self, key: str, num_bytes: int, about: About) -> None:
        """Records a write."""
        facts = {"tokens": about.num_tokens, "seconds": about.seconds, "tenant": about.tenant}
        self._write("put", key, bytes=num_bytes, **facts)

    def histograms(self) -> dict[str, dict[int, int]]:
        """Counts by the upper end of power-of-two buckets.

        ``reuse_distance``: lookups between two of a key; ``lifetime_s``: from its first to a later.
        """
        return {
            "reuse_distance": {2 ** (n + 1): c for n, c in sorted(self._distances.items())},
            "lifetime_s": {2**n: c for n, c in sorted(self._lifetimes.items())},
        }

    def _write(self, op: str, key: str, **facts) -> None:
        if self._file is not None:
            record = {"t": round(time.time(), 6), "key": key[:_SHOWN], "op": op} | facts
            try:
                self._file.write(f"{json.dumps(record)}\n".encode())
            except OSError as error:  # such as a full disk, which must not stop answers
                _LOG.warning("the trace '%s' ends here: %s", self._file.name, error.strerror)
                self._file = None
