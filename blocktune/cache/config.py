"""What a store is told: place and limits, as one line of text; and what it tells: counters, traces.

No torch.
"""

from __future__ import annotations

import json
import re
import time
from collections import Counter, OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import astuple, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, Self, TextIO

POLICIES = {
    "lru": "used",
    "lfu": "uses",
    "fifo": "created",
    "gdsf": "clock + uses * seconds * 1e9 / size",
}
"""What an entry is worth, in SQL over its columns: the least leaves first, then the least used.

``gdsf``: seconds of encoding saved per byte (Cherkasova, Greedy-Dual-Size-Frequency, HPL-98-69R1);
``clock`` is the worth of what left last when the entry was used, so that old fame fades.
"""
CODECS = ("as-is", "fp8", "int8", "int4")
MEMORY = 4 << 30
Tier = Literal["memory", "cpu", "disk", "remote", "none"]
_REMEMBERED = 1 << 16
"""Keys whose last use a trace remembers."""
_SHOWN = 16
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


@dataclass(frozen=True)
class About:
    """What is known of an entry beside its key and size."""

    num_tokens: int = 0
    kind: str = ""
    fingerprint: str = ""  # of the model that made it
    document: str = ""  # whose passage it is, as the user names it
    tenant: str = ""  # whose it is; counts for quotas
    seconds: float = 0.0  # that encoding it took: what a hit saves
    expires: float | None = None  # when it counts as gone, in seconds of the epoch; None: never


@dataclass(frozen=True)
class Row(About):
    """An entry as the ledger has it; times are seconds of the epoch."""

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
        """Of a file, by what its header says."""
        try:
            seconds, expires = (float(header.get(name, 0.0)) for name in ("seconds", "expires"))
        except ValueError:
            seconds = expires = 0.0
        texts = (header.get(n, "") for n in ("kind", "fingerprint", "document", "tenant"))
        return cls(num_tokens, *texts, seconds, expires or None, key, size, used, used, 1)


def parse_bytes(text: str) -> int:
    """Bytes of a text such as ``50GB``."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kmgt]?)b?", text.strip().lower())
    if not found:
        raise ValueError(f"a size is a number with kB, MB, GB or TB, got '{text}'")
    return int(float(found[1]) * _UNITS[found[2]])


def parse_seconds(text: str) -> float:
    """Seconds of a text such as ``30d``."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([smhd]?)", text.strip().lower())
    if not found:
        raise ValueError(f"a time is a number with s, m, h or d, got '{text}'")
    return float(found[1]) * _SECONDS[found[2]]


@dataclass(frozen=True)
class StoreConfig:
    """A store, its tiers and their limits in bytes; ValueError if a value is out of range."""

    folder: Path | None = None  # of the files; None: none on disk
    remote: str | None = None  # URL that machines share, see `open_remote`; None: none
    memory: int = MEMORY  # on the model's device
    cpu: int = 0  # of the host, for what leaves the device
    disk: int | None = None  # of the folder; None: no limit
    remote_bytes: int | None = None
    policy: str | None = None  # one of `POLICIES`; None: as the folder was last opened with
    quota: int | None = None  # of each tier that one tenant may hold
    ttl: float | None = None  # seconds after which a chunk is encoded again
    codec: str = "as-is"  # how files hold keys and values, one of `CODECS`
    press: str | None = None  # ``NAME:RATIO`` of kvpress, which thins chunks before they are kept
    trace: Path | None = None  # file that gets a JSON line for every look-up and write

    def __post_init__(self):
        if self.memory + self.cpu == 0 and self.place is None:
            raise ValueError("a chunk store needs memory or a folder; got 0 bytes, folder None")
        for name in ("memory", "cpu", "disk", "remote_bytes", "quota"):
            if (size := getattr(self, name)) is not None and size < 0:
                raise ValueError(f"{name} is a number of bytes, 0 or more; got {size}")
        if self.ttl is not None and self.ttl <= 0:
            raise ValueError(f"ttl must be more than 0 seconds, got {self.ttl}")
        for name, known in (("policy", POLICIES), ("codec", CODECS)):
            if getattr(self, name) not in (*known, None):
                raise ValueError(
                    f"unknown {name} '{getattr(self, name)}'; available: {', '.join(known)}"
                )

    @property
    def place(self) -> str | None:
        """The folder or else the URL, for messages."""
        return str(self.folder) if self.folder is not None else self.remote

    @classmethod
    def parse(cls, text: str | Path, **defaults) -> StoreConfig:
        """Reads ``PLACE,name=value,...``: a folder or a URL, then budgets.

        Such as ``chunks/``, ``s3://bucket/chunks``, ``chunks/,disk=50GB,policy=gdsf`` or
        ``chunks/,cpu=8GB,remote=valkey://host:6379/0,codec=fp8,ttl=30d``. The place may be left
        out: ``memory=2GB,codec=fp8``. A folder that exists is one, whatever its name.

        Raises:
            ValueError: If a name or value is wrong; says which there are.
        """
        known = {field.name for field in fields(cls)} - {"folder"}
        if isinstance(text, Path) or (text and Path(text).is_dir()):  # Path("") is where we are
            return cls(**defaults | {"folder": Path(text)})
        first, *rest = text.split(",")
        values = dict(defaults)
        if "://" in first and "=" not in first.partition("://")[0]:
            values["remote"] = first
        elif "=" in first:
            rest = [first, *rest]
        elif first:
            values["folder"] = Path(first)
        for pair in rest:
            name, equals, value = (part.strip() for part in pair.partition("="))
            if not equals or name not in known:
                raise ValueError(
                    f"--store is PLACE,name=value,... with {', '.join(sorted(known))}; got '{pair}'"
                )
            if name in values and name not in defaults:
                raise ValueError(f"--store: '{name}' is given twice; give it once")
            values[name] = _READ.get(name, str)(value)
        return cls(**values)


_READ = dict.fromkeys(("memory", "cpu", "disk", "remote_bytes", "quota"), parse_bytes)
_READ |= {"ttl": parse_seconds, "trace": Path}


def keep_latest(known: dict, key: Hashable, value: Any, most: int) -> None:
    """Puts a value last, and drops the first ones of too many: clients may make up any number."""
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
    expired: int = 0  # also misses
    unwritten: int = 0  # that could not be kept
    failures: int = 0  # requests that the tier did not answer


@dataclass
class StoreStats:
    """Counters since the store was opened."""

    misses: int = 0
    rejected: int = 0  # of them: damaged, forged, of other tokens or another model
    first_rejected: str = ""  # why the first was
    memory_bytes: int = 0
    tiers: dict[str, TierStats] = field(default_factory=dict)

    @property
    def files(self) -> TierStats:
        """Counters of the folder and the remote, added up."""
        held = (astuple(self.tiers[name]) for name in ("disk", "remote") if name in self.tiers)
        return TierStats(*map(sum, zip(*held, strict=True)))


class Tracer:
    """Counts uses, and writes them to a file of JSON lines if it gets a path.

    Lines: ``{"t", "op": "get" or "put", "key", "tokens", "bytes", "tier" or "seconds", ...}``, with
    ``t`` in seconds of the epoch. Lines of several processes may share a file.
    """

    def __init__(self, path: Path | None = None):
        """Raises ValueError if the file cannot be written."""
        self._file: TextIO | None = None
        self._count, self._last = 0, OrderedDict()
        self._distances, self._lifetimes = Counter(), Counter()
        if path is not None:
            try:
                self._file = path.open("a", encoding="utf-8", buffering=1)
            except OSError as error:
                raise ValueError(f"cannot write the trace '{path}': {error.strerror}") from None

    def looked_up(self, key: str, tokens: int, tier: str, num_bytes: int, seconds: float) -> None:
        """Notes a look-up; ``tier`` is ``"none"`` for a miss, ``seconds`` what it took."""
        self._count += 1
        now, last = time.monotonic(), self._last.pop(key, None)
        if last is not None:
            self._distances[(self._count - last[0]).bit_length() - 1] += 1
            self._lifetimes[int(now - last[1]).bit_length()] += 1
        self._last[key] = (self._count, last[1] if last else now)
        if len(self._last) > _REMEMBERED:
            self._last.popitem(last=False)
        if self._file is not None:  # facts are made for it alone: look-ups are short
            facts = {"tokens": tokens, "bytes": num_bytes, "tier": tier, "load_s": seconds}
            self._write(op="get", key=key, **facts)

    def put(self, key: str, num_bytes: int, about: About) -> None:
        """Notes a write."""
        facts = {"tokens": about.num_tokens, "bytes": num_bytes}
        self._write(op="put", key=key, **facts, seconds=about.seconds, tenant=about.tenant)

    def histograms(self) -> dict[str, dict[int, int]]:
        """Counts by the upper ends of buckets, powers of two.

        ``reuse_distance``: look-ups between two of the same key; ``lifetime_s``: age of a key,
        since it was first asked for, at each use.
        """
        return {
            "reuse_distance": {2 ** (n + 1): c for n, c in sorted(self._distances.items())},
            "lifetime_s": {2**n: c for n, c in sorted(self._lifetimes.items())},
        }

    def _write(self, key: str, **record) -> None:
        if self._file is not None:
            line = json.dumps({"t": round(time.time(), 6), "key": key[:_SHOWN]} | record)
            self._file.write(line + "\n")
