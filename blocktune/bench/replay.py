"""Simulation of a store on a trace: hit rate and time saved by size and policy; break-even point.

A trace lists the chunks of each request. It is recorded by a store (JSON lines of ``--store
...,trace=FILE``), published (Mooncake: ``hash_ids`` of blocks of 512 tokens; Azure: CSV, whose
contexts are filled with random chunks, since it names none), or random. Files may be gzipped.
"""

from __future__ import annotations

import csv
import gzip
import json
import random
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, count, groupby, islice, pairwise, takewhile
from pathlib import Path
from typing import NamedTuple

from blocktune.cache.store.ledger import About, Ledger

WINDOWS = 10
CHUNKS, EXPONENT = 10, 0.9  # chunks of a random request; exponent of their Zipf distribution
BLOCK = 512  # tokens per block in Mooncake's traces, and per random chunk
SAME_REQUEST_S = 0.001  # recorded look-ups within this time of each other form one request
MOST = 1 << 32, 1 << 60, float("inf")  # more than a chunk has of tokens, bytes and seconds


class Use(NamedTuple):
    """A chunk that a request uses. ``num_bytes`` and ``seconds`` are 0 if unknown."""

    key: str
    num_tokens: int
    num_bytes: int = 0
    seconds: float = 0.0


Request = tuple[Use, ...]


@dataclass(frozen=True)
class Costs:
    """Costs per token. The defaults approximate Llama-3.1-8B in bfloat16 on one GPU."""

    token_bytes: int = 131_072  # bytes of a token's keys and values
    token_s: float = 1e-4  # seconds to encode a token
    pair_s: float = 1e-8  # additional seconds for each earlier token that it attends to
    load_bytes_s: float = 4e9  # bytes loaded and moved per second

    def encode_s(self, tokens: int) -> float:
        """Seconds to encode tokens without a prefix."""
        return self.token_s * tokens + self.pair_s * tokens * tokens / 2

    def load_s(self, tokens: int) -> float:
        """Seconds to load the keys and values of tokens."""
        return tokens * self.token_bytes / self.load_bytes_s

    def priced(self, use: Use) -> Use:
        """Fills in bytes and seconds if they are unknown."""
        return use._replace(
            num_bytes=use.num_bytes or use.num_tokens * self.token_bytes,
            seconds=use.seconds or self.encode_s(use.num_tokens),
        )


class Outcome(NamedTuple):
    """Result of a simulation with one size and policy."""

    policy: str  # see `blocktune.cache.store.ledger.POLICIES`
    budget: int  # bytes
    hit_rate: float  # hits per look-up
    saved_s: float  # seconds of encoding saved by hits, minus seconds of loading
    saved: float  # ``saved_s`` as a share of the time to encode everything
    peak_bytes: int  # maximum size of the store
    windows: list[float]  # ``hit_rate`` of each tenth of the trace


def touched_bytes(requests: Iterable[Request], costs: Costs = Costs()) -> int:
    """Total bytes of the distinct chunks of a trace."""
    sizes = {use.key: costs.priced(use).num_bytes for request in requests for use in request}
    return sum(sizes.values())


def replay(
    requests: Sequence[Request], budget: int, policy: str = "lru", costs: Costs = Costs()
) -> Outcome:
    """Simulates a store of one tier with ``budget`` bytes; ``costs`` fill in what is unknown."""
    clock = count(1)
    ledger = Ledger(max_bytes=budget, policy=policy, clock=lambda: next(clock) * 1e-4)
    stored: dict[str, int] = {}
    windows: list[list[bool]] = [[] for _ in range(WINDOWS)]  # whether each look-up was a hit
    saved_s, encode_s, held, peak = 0.0, 0.0, 0, 0
    with ledger.transaction():
        for index, request in enumerate(requests):
            window = windows[index * WINDOWS // len(requests)]
            for use in map(costs.priced, request):
                encode_s += use.seconds
                window.append(use.key in stored)
                if use.key in stored:
                    saved_s += use.seconds - use.num_bytes / costs.load_bytes_s
                    ledger.use(use.key)
                elif (evicted := ledger.leaving(use.num_bytes, key=use.key)) is not None:
                    ledger.remove(evicted)
                    held += use.num_bytes - sum(map(stored.pop, evicted))
                    peak = max(peak, held)
                    ledger.add(use.key, use.num_bytes, About(seconds=use.seconds))
                    stored[use.key] = use.num_bytes
    every = list(chain.from_iterable(windows))
    total, *rates = (sum(hits) / max(len(hits), 1) for hits in (every, *windows))
    return Outcome(policy, budget, total, saved_s, saved_s / encode_s, peak, rates)


class BreakEven(NamedTuple):
    """Mean seconds to the first token by kind of cache, at one share of repeated chunks."""

    repeated: float  # share of chunks that an earlier request had
    none_s: float  # without a cache
    prefix_s: float  # with prefix caching
    reuse_s: float  # with chunk reuse


def break_even(
    recompute: float = 0.0, requests: int = 2000, costs: Costs = Costs()
) -> list[BreakEven]:
    """Compares chunk reuse with prefix caching, by share of repeated chunks; both unbounded.

    Retrieved chunks come in any order; a shared prefix is the same chunks in the same order.
    ``recompute``: share of recomputed tokens. A request has `CHUNKS` of `BLOCK` tokens.
    """
    points, full_s = [], costs.encode_s(CHUNKS * BLOCK)
    for step in range(11):
        prefix_s, hits, draw = 0.0, 0, random.Random(0)
        seen: set[str] = set()
        prefixes: set[tuple[str, ...]] = set()
        for request in zipf_requests(requests, 1 - step / 10, catalogue=requests):
            keys = [use.key for use in request]
            draw.shuffle(keys)
            starts = [tuple(keys[: n + 1]) for n in range(CHUNKS)]
            shared = BLOCK * len(list(takewhile(prefixes.__contains__, starts)))
            prefix_s += full_s - costs.encode_s(shared) + costs.load_s(shared)
            hits += len(seen.intersection(keys))
            seen.update(keys)
            prefixes.update(starts)
        reuse_s = (requests * CHUNKS - hits) * costs.encode_s(BLOCK) + costs.load_s(hits * BLOCK)
        reuse_s = reuse_s / requests + recompute * full_s
        points.append(BreakEven(hits / requests / CHUNKS, full_s, prefix_s / requests, reuse_s))
    return points


def plot_replay(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Plots hit rate and share of time saved against the budget, and hit rate over time."""
    from blocktune.evaluation.report import style

    colours = {"gdsf": 2, "lru": 3, "lfu": 4, "fifo": 1}  # indices in the palette
    ticks = sorted({outcome.budget / 1e9 for outcome in outcomes})

    def draw(figure, ground) -> None:
        axes, ends = figure.subplots(1, 3), {}
        for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
            line = sorted((o for o in outcomes if o.policy == policy), key=lambda o: o.budget)
            budgets, colour = [o.budget / 1e9 for o in line], ground.series[colours[policy]]
            axes[0].plot(budgets, [o.hit_rate for o in line], ".-", color=colour)
            axes[1].plot(budgets, [o.saved for o in line], ".-", color=colour)
            axes[2].plot(range(1, WINDOWS + 1), line[-1].windows, ".-", color=colour)
            ends[policy] = line[-1].windows[-1], colour
        titles = ("Hits", "Encoding time saved", f"Hits at {ticks[-1]:.3g} GB")
        for axis, title in zip(axes, titles, strict=True):
            axis.set(title=title, ylim=(0, None), xlabel="budget, GB", xscale="log")
            axis.set_xticks(ticks, [f"{tick:.{1 if tick < 10 else 0}f}" for tick in ticks])
            axis.minorticks_off()
            style.as_share(axis.yaxis)
        axes[2].set(xlabel="tenth of the trace", xscale="linear", xlim=(1, WINDOWS))
        axes[2].set_xticks(range(1, WINDOWS + 1))
        style.label_ends(axes[2], ends)

    return style.to_png(draw, path, height=3.0, width=9.0)


def plot_break_even(by_recompute: dict[float, Sequence[BreakEven]], path: Path) -> Path:
    """Plots the mean time to first token against the share of repeated chunks."""
    from blocktune.evaluation.report import style

    first = next(iter(by_recompute.values()))

    def draw(figure, ground) -> None:
        axis, ends = figure.subplots(), {}
        lines = {"prefix caching": [p.prefix_s for p in first]}
        lines["no cache"] = [p.none_s for p in first]
        for recompute, points in by_recompute.items():
            lines[f"chunk reuse\n{recompute:.0%} recomputed"] = [p.reuse_s for p in points]
        for (name, seconds), colour in zip(lines.items(), ground.series, strict=False):
            style_of = ":" if name == "no cache" else "-"
            axis.plot([p.repeated for p in first], seconds, style_of, color=colour)
            ends[name] = seconds[-1], colour
        axis.set(xlabel="chunks seen before", ylabel="to the first token, s", ylim=(0, None))
        axis.set_xlim(0, first[-1].repeated)
        style.as_share(axis.xaxis)
        style.label_ends(axis, ends)

    return style.to_png(draw, path, height=3.0, width=5.6)


def zipf_requests(
    requests: int = 10_000, novel: float = 0.3, seed: int = 0, catalogue: int = 10_000
) -> Iterator[Request]:
    """Generates random requests that mix new chunks with repeated ones.

    A chunk is new with probability ``novel``, and then never occurs again. Otherwise it is drawn
    from a ``catalogue``, the ``n``-th chunk with weight ``n ** -EXPONENT`` (Zipf). Lengths are
    powers of two from 64 to 2,048 tokens, so that chunks differ in time saved per byte.
    """
    draw = random.Random(seed)
    sizes = [2 ** draw.randrange(6, 12) for _ in range(catalogue)]
    for _ in range(requests):
        uses = {}
        while len(uses) < CHUNKS:
            number = len(sizes)
            if draw.random() < novel:
                sizes.append(2 ** draw.randrange(6, 12))
            else:
                number = _rank(draw, catalogue) - 1
            uses[number] = Use(f"drawn {number}", sizes[number])
        yield tuple(uses.values())


def read_requests(path: str | Path, limit: int | None = None) -> list[Request]:
    """Reads a trace, or generates one if ``path`` is ``zipf``. Raises ValueError for a bad line."""
    if str(path) == "zipf":
        return list(zipf_requests(limit or 10_000))
    opened = gzip.open if str(path).lower().endswith(".gz") else open
    try:
        with opened(path, "rt", encoding="utf-8-sig") as file:
            first = file.readline()
            lines = iter((first, *file))
            azure = first.startswith("TIMESTAMP,")
            requests = list(islice(_azure(lines) if azure else _json_lines(lines), limit))
    except (OSError, EOFError, zlib.error, LookupError, TypeError, ValueError) as error:
        kind = "" if type(error) is ValueError else f"{type(error).__name__} "
        reason = getattr(error, "strerror", None) or f"{kind}{error}"
        raise ValueError(f"cannot read the trace '{path}': {reason}") from None
    if not any(requests):
        raise ValueError(f"{path}: an empty trace")
    for _, *given in chain.from_iterable(requests):
        numbers = zip((1, 0, 0), given, MOST, strict=True)
        if not all(isinstance(n, int | float) and low <= n < high for low, n, high in numbers):
            wanted = "tokens must be a number above 0, bytes and seconds 0 or more"
            raise ValueError(f"{path}: {wanted}, got {given!r:.80}")
    return requests


def _json_lines(lines: Iterator[str]) -> Iterator[Request]:
    records = _records(lines)
    first = next(records, {"op": ""})
    if "hash_ids" in first:
        for record in chain([first], records):
            left = count(record["input_length"], -BLOCK)
            sizes = zip(record["hash_ids"], left, strict=False)  # ``left`` is infinite
            yield tuple(Use(str(block), max(1, min(BLOCK, size))) for block, size in sizes)
        return
    if "op" not in first:
        raise ValueError("neither of a store nor Mooncake's; see `--help`")
    everything = [first, *records]
    puts = {record["key"]: record for record in everything if record["op"] == "put"}
    gets = [record for record in everything if record["op"] == "get"]
    starts_new = [b["t"] - b["load_s"] - a["t"] > SAME_REQUEST_S for a, b in pairwise(gets)]
    numbers = accumulate(starts_new, initial=0)  # request number of each look-up; never empty
    for _, group in groupby(zip(numbers, gets, strict=False), key=lambda pair: pair[0]):
        uses = []
        for _, got in group:
            put = puts.get(got["key"], {})
            num_bytes = put.get("bytes") or got["bytes"]
            uses.append(Use(got["key"], got["tokens"], num_bytes, put.get("seconds", 0.0)))
        yield tuple(uses)


def _records(lines: Iterator[str]) -> Iterator[dict]:
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line) if line.strip() else {}
        except ValueError:
            record = None
        if record is None and not line.endswith("\n"):
            return  # the last line is incomplete if the store was stopped
        if not isinstance(record, dict):
            raise ValueError(f"line {number}: not a JSON object")
        if record:
            yield record


def _azure(lines: Iterator[str]) -> Iterator[Request]:
    draw, seen = random.Random(0), 0
    for row in csv.DictReader(lines):
        uses = {}
        for left in range(int(row["ContextTokens"]), 0, -BLOCK):
            is_new = not seen or draw.random() < 0.5
            seen += is_new
            rank = seen if is_new else _rank(draw, seen)
            uses[rank] = Use(f"drawn {rank}", min(BLOCK, left))
        yield tuple(uses.values())


def _rank(draw: random.Random, most: int) -> int:
    """Draws from 1 to ``most`` with weights ``rank ** -EXPONENT``, by the inverse integral."""
    power = 1 - EXPONENT
    return min(most, int((1 + draw.random() * ((most + 1) ** power - 1)) ** (1 / power)))
