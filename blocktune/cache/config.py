"""Where a store keeps chunks and within which limits, as one line of text says it. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from pathlib import Path

from blocktune.cache.ledger import POLICIES

CODECS = ("as-is", "fp8", "int8", "int4")
MEMORY = 4 << 30
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_SECONDS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_bytes(text: str) -> int:
    """Bytes of a text such as ``50GB``.

    Raises:
        ValueError: If it is not a size.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kmgt]?)b?", text.strip().lower())
    if not found:
        raise ValueError(f"a size is a number with kB, MB, GB or TB, got '{text}'")
    return int(float(found[1]) * _UNITS[found[2]])


def parse_seconds(text: str) -> float:
    """Seconds of a text such as ``30d``.

    Raises:
        ValueError: If it is not a time.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([smhd]?)", text.strip().lower())
    if not found:
        raise ValueError(f"a time is a number with s, m, h or d, got '{text}'")
    return float(found[1]) * _SECONDS[found[2]]


@dataclass(frozen=True)
class StoreConfig:
    """A store, its tiers and their limits.

    Attributes:
        folder: Of the files; None: none on disk.
        remote: URL that machines share, see `blocktune.cache.remote`; None: none.
        memory: Bytes on the model's device.
        cpu: Bytes of host memory, for what leaves the device.
        disk: Bytes of the folder; None: no limit.
        remote_bytes: Bytes of the remote; None: no limit.
        policy: What leaves first in every tier, one of `blocktune.cache.ledger.POLICIES`; None:
            as the folder was last opened with, else ``lru``.
        quota: Bytes of each tier that one tenant may hold; None: no limit.
        ttl: Seconds after which a chunk is encoded again; None: never.
        codec: How files hold keys and values, see `blocktune.cache.codecs`.
        press: ``NAME:RATIO`` of kvpress, which thins chunks before they are kept, see
            `blocktune.methods.press`; None: all keys are kept.
        trace: File that gets a JSON line for every look-up and write; None: none.

    Raises:
        ValueError: If a value is out of range.
    """

    folder: Path | None = None
    remote: str | None = None
    memory: int = MEMORY
    cpu: int = 0
    disk: int | None = None
    remote_bytes: int | None = None
    policy: str | None = None
    quota: int | None = None
    ttl: float | None = None
    codec: str = "as-is"
    press: str | None = None
    trace: Path | None = None

    def __post_init__(self):
        places = self.folder is not None or self.remote is not None
        if self.memory < 0 or (self.memory + self.cpu == 0 and not places):
            raise ValueError(
                f"a chunk store needs memory or a folder; got {self.memory} bytes, folder None"
            )
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
            values[name] = _value(name, value)
        return cls(**values)


def _value(name: str, text: str):
    if name in ("memory", "cpu", "disk", "remote_bytes", "quota"):
        return parse_bytes(text)
    if name == "ttl":
        return parse_seconds(text)
    return Path(text) if name == "trace" else text
