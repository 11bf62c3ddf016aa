"""Requests and the chunks that they ask for: recorded by a store, published, or drawn.

Read: the JSON lines of `--store ...,trace=FILE`; Mooncake's (``hash_ids``, blocks of 512 tokens);
Azure's CSV, which names no contents (``TIMESTAMP,ContextTokens,GeneratedTokens``): its lengths are
filled with drawn chunks. A name that ends in ``.gz`` is read as it is.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import zlib
from collections.abc import Iterator
from itertools import accumulate, chain, groupby, islice, pairwise
from pathlib import Path
from typing import IO, NamedTuple

BLOCK = 512  # tokens of a block of Mooncake's traces, and of drawn chunks
SAME_REQUEST_S = 0.001  # look-ups of a recorded store this close to each other are one request


class Use(NamedTuple):
    """A chunk that a request asks for; ``num_bytes`` and ``seconds`` are 0 where unknown."""

    key: str
    num_tokens: int
    num_bytes: int = 0
    seconds: float = 0.0
    tenant: str = ""


Request = tuple[Use, ...]


def zipf_requests(
    count: int = 10_000,
    chunks: int = 10,
    novel: float = 0.3,
    exponent: float = 0.9,
    seed: int = 0,
    catalogue: int = 10_000,
) -> Iterator[Request]:
    """Sustained novelty: chunks that recur by a Zipf law among ever new ones.

    A chunk of a request is new with probability ``novel``, and never comes back; else it is the
    ``n``-th of a ``catalogue`` with weight ``n ** -exponent``. Lengths are 64 to 2,048 tokens, in
    octaves, so that chunks differ in what encoding them saves per byte.
    """
    draw = random.Random(seed)
    sizes = [2 ** draw.randrange(6, 12) for _ in range(catalogue)]
    for _ in range(count):
        uses = {}
        while len(uses) < chunks:
            number = len(sizes)
            if draw.random() < novel:
                sizes.append(2 ** draw.randrange(6, 12))
            else:
                number = _rank(draw, catalogue, exponent) - 1
            uses[number] = Use(f"drawn {number}", sizes[number])
        yield tuple(uses.values())


def read_requests(path: str | Path, limit: int | None = None, seed: int = 0) -> list[Request]:
    """Requests of a file, or drawn where ``path`` is ``zipf``; a ValueError names a wrong line."""
    if str(path) == "zipf":
        return list(zipf_requests(limit or 10_000, seed=seed))
    try:
        with _opened(Path(path)) as file:
            first = file.readline()
            lines = iter((first, *file))
            azure = first.startswith("TIMESTAMP,")
            made = islice(_azure(lines, seed) if azure else _json_lines(lines), limit)
            requests = [request for request in made if all(map(_checked, request))]
    except (OSError, EOFError, zlib.error, LookupError, TypeError, ValueError) as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__} "
        raise ValueError(f"cannot read the trace '{path}': {kind}{error}") from None
    if not any(requests):
        raise ValueError(f"{path}: an empty trace")
    return requests


def _checked(use: Use) -> bool:
    if use.num_tokens < 1 or use.num_bytes < 0 or use.seconds < 0:
        raise ValueError(f"a chunk has tokens, and no less than 0 bytes and seconds; got {use}")
    return True


def _opened(path: Path) -> IO[str]:
    return gzip.open(path, "rt") if path.suffix == ".gz" else path.open(encoding="utf-8")


def _json_lines(lines: Iterator[str]) -> Iterator[Request]:
    records = _records(lines)
    first = next(records, {"op": ""})
    if "hash_ids" in first:
        for record in chain([first], records):
            left = record["input_length"]
            uses = []
            for block in record["hash_ids"]:
                uses.append(Use(str(block), max(1, min(BLOCK, left))))
                left -= BLOCK
            yield tuple(uses)
        return
    if "op" not in first:
        raise ValueError("neither of a store nor Mooncake's; see `--help`")
    everything = [first, *records]
    made = {record["key"]: record for record in everything if record["op"] == "put"}
    gets = [record for record in everything if record["op"] == "get"]
    ends = [b["t"] - b["load_s"] - a["t"] > SAME_REQUEST_S for a, b in pairwise(gets)]
    numbers = accumulate(ends, initial=0)  # one number even of no look-up
    for _, group in groupby(zip(numbers, gets, strict=False), key=lambda pair: pair[0]):
        yield tuple(_use(record, made.get(record["key"], {})) for _, record in group)


def _use(got: dict, put: dict) -> Use:
    num_bytes = put.get("bytes") or got["bytes"]
    return Use(got["key"], got["tokens"], num_bytes, put.get("seconds", 0.0), put.get("tenant", ""))


def _records(lines: Iterator[str]) -> Iterator[dict]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if record is None and not line.endswith("\n"):
            return  # a stopped store left it half-written
        if not isinstance(record, dict):
            raise ValueError(f"line {number}: not a JSON object")
        yield record


def _azure(lines: Iterator[str], seed: int) -> Iterator[Request]:
    draw, seen = random.Random(seed), 0
    for row in csv.DictReader(lines):
        uses, left = {}, int(row["ContextTokens"])
        while left > 0:
            if not seen or draw.random() < 0.5:
                seen += 1
                rank = seen
            else:
                rank = _rank(draw, seen, 0.9)
            uses[rank] = Use(f"drawn {rank}", min(BLOCK, left))
            left -= BLOCK
        yield tuple(uses.values())


def _rank(draw: random.Random, count: int, exponent: float) -> int:
    """1 to ``count`` with weights ``rank ** -exponent``, by inverting the integral."""
    power = 1 - exponent
    return min(count, int((1 + draw.random() * ((count + 1) ** power - 1)) ** (1 / power)))
