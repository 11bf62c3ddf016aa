"""What a store did: a line for every look-up and write, reuse distances and lifetimes."""

from __future__ import annotations

import json
import time
from collections import Counter, OrderedDict
from pathlib import Path
from typing import TextIO

from blocktune.cache.chunk_kv import Entry
from blocktune.cache.ledger import About

_REMEMBERED = 1 << 16  # keys whose last use is remembered
_SHOWN = 16


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
        self._write(op="get", key=key, tokens=tokens, bytes=num_bytes, tier=tier, load_s=seconds)

    def put(self, key: str, kv: Entry, about: About) -> None:
        """Notes a write."""
        self._write(
            op="put",
            key=key,
            tokens=kv.num_tokens,
            bytes=kv.num_bytes,
            seconds=about.seconds,
            tenant=about.tenant,
        )

    def histograms(self) -> dict[str, dict[int, int]]:
        """Counts by powers of two.

        Returns:
            ``reuse_distance``: look-ups between two of the same key; ``lifetime_s``: age of a key,
            since it was first asked for, at each use. Each maps the upper end of a bucket to its
            count.
        """
        return {
            "reuse_distance": {2 ** (n + 1): c for n, c in sorted(self._distances.items())},
            "lifetime_s": {2**n: c for n, c in sorted(self._lifetimes.items())},
        }

    def _write(self, key: str, **record) -> None:
        if self._file is not None:
            line = json.dumps({"t": round(time.time(), 6), "key": key[:_SHOWN]} | record)
            self._file.write(line + "\n")
