"""What a store of a given size and policy would have saved on a trace, and when reuse pays at all.

Simulated: nothing is encoded. Costs come from the trace where a store recorded them, else from
`Costs`.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from blocktune.bench.traces import Request, Use, zipf_requests
from blocktune.cache.ledger import About, Ledger

WINDOWS = 10


@dataclass(frozen=True)
class Costs:
    """What a token costs. The defaults are of the size of Llama-3.1-8B in bfloat16 on one GPU."""

    token_bytes: int = 131_072  # bytes of a token's keys and values
    token_s: float = 1e-4  # seconds to encode a token
    pair_s: float = 1e-8  # seconds more for each earlier token that it attends to
    load_bytes_s: float = 4e9  # bytes per second that are loaded and moved

    def encode_s(self, tokens: int, before: int = 0) -> float:
        """Seconds to encode tokens after ``before`` others."""
        return self.token_s * tokens + self.pair_s * tokens * (before + tokens / 2)

    def load_s(self, tokens: int) -> float:
        """Seconds to load tokens."""
        return tokens * self.token_bytes / self.load_bytes_s

    def priced(self, use: Use) -> Use:
        """With bytes and seconds."""
        return use._replace(
            num_bytes=use.num_bytes or use.num_tokens * self.token_bytes,
            seconds=use.seconds or self.encode_s(use.num_tokens),
        )


class Outcome(NamedTuple):
    """What one size and policy gives."""

    policy: str  # see `blocktune.cache.ledger.POLICIES`
    budget: int  # bytes
    hit_rate: float  # hits per look-up
    saved_s: float  # seconds of encoding that hits saved, less those of loading
    saved: float  # the same as a share of encoding everything
    peak_bytes: int  # most that it held
    windows: list[float]  # ``hit_rate`` of each tenth of the trace


def touched_bytes(requests: Iterable[Request], costs: Costs = Costs()) -> int:
    """Bytes of all different chunks of a trace."""
    different = {use.key: costs.priced(use).num_bytes for one in requests for use in one}
    return sum(different.values())


def replay(
    requests: Sequence[Request], budget: int, policy: str = "lru", costs: Costs = Costs()
) -> Outcome:
    """Plays a trace against one tier of ``budget`` bytes; ``costs`` are of what it does not say."""
    clock = itertools.count(1)
    ledger = Ledger(max_bytes=budget, policy=policy, clock=lambda: next(clock) * 1e-4)
    there: dict[str, int] = {}
    windows = [[0, 0] for _ in range(WINDOWS)]
    saved_s, whole_s, held, peak = 0.0, 0.0, 0, 0
    with ledger.transaction():
        for index, request in enumerate(requests):
            window = windows[index * WINDOWS // len(requests)]
            for use in map(costs.priced, request):
                whole_s += use.seconds
                window[1] += 1
                if use.key in there:
                    window[0] += 1
                    saved_s += use.seconds - use.num_bytes / costs.load_bytes_s
                    ledger.use(use.key)
                    continue
                doomed = ledger.leaving(use.num_bytes, use.tenant, use.key)
                if doomed is None:
                    continue
                ledger.remove(doomed)
                held += use.num_bytes - sum(there.pop(key) for key in doomed)
                peak = max(peak, held)
                ledger.add(use.key, use.num_bytes, About(seconds=use.seconds, tenant=use.tenant))
                there[use.key] = use.num_bytes
    hits, lookups = (sum(window[n] for window in windows) for n in (0, 1))
    rates = [hit / max(count, 1) for hit, count in windows]
    return Outcome(policy, budget, hits / max(lookups, 1), saved_s, saved_s / whole_s, peak, rates)


class BreakEven(NamedTuple):
    """Mean seconds to the first token at one share of repeated chunks, by way of caching."""

    repeated: float
    none_s: float
    prefix_s: float
    reuse_s: float


def break_even(
    recompute: float = 0.0,
    chunks: int = 10,
    tokens: int = 512,
    requests: int = 2000,
    costs: Costs = Costs(),
    seed: int = 0,
) -> list[BreakEven]:
    """Chunk reuse against prefix caching over the share of chunks that were seen before.

    Retrieval orders chunks freely, so a prefix is shared only if it begins with the same chunks in
    the same order. Both caches are unbounded. ``recompute`` is the share of the reused tokens that
    the method computes again; each point has ``requests`` of ``chunks`` of ``tokens`` tokens.
    """
    found = []
    for step in range(11):
        totals, counts = [0.0, 0.0, 0.0], [0, 0]
        seen: set[str] = set()
        prefixes: set[tuple[str, ...]] = set()
        draw = random.Random(seed)
        novel = 1 - step / 10
        for request in zipf_requests(requests, chunks, novel, seed=seed, catalogue=requests):
            keys = [use.key for use in request]
            draw.shuffle(keys)
            whole = costs.encode_s(len(keys) * tokens)
            shared = 0
            while shared < len(keys) and tuple(keys[: shared + 1]) in prefixes:
                shared += 1
            totals[0] += whole
            totals[1] += whole - costs.encode_s(shared * tokens) + costs.load_s(shared * tokens)
            hits = len(seen.intersection(keys))
            counts = [counts[0] + hits, counts[1] + len(keys)]
            totals[2] += (len(keys) - hits) * costs.encode_s(tokens)
            totals[2] += costs.load_s(hits * tokens) + recompute * whole
            seen.update(keys)
            prefixes.update(tuple(keys[:n]) for n in range(1, len(keys) + 1))
        found.append(BreakEven(counts[0] / counts[1], *(total / requests for total in totals)))
    return found


COLOURS = {"gdsf": 2, "lru": 3, "lfu": 4, "fifo": 1}
"""Of each policy, its place in the palette."""


def plot_replay(outcomes: Sequence[Outcome], path: Path) -> Path:
    """Hit rate and the share of seconds saved against the budget, and hit rate over time."""
    from blocktune.evaluation.report import style

    largest = max(outcome.budget for outcome in outcomes)
    ticks = sorted({outcome.budget / 1e9 for outcome in outcomes})

    def draw(figure, ground) -> None:
        axes, ends = figure.subplots(1, 3), {}
        for policy in dict.fromkeys(outcome.policy for outcome in outcomes):
            mine = sorted((o for o in outcomes if o.policy == policy), key=lambda o: o.budget)
            budgets, colour = [o.budget / 1e9 for o in mine], ground.series[COLOURS[policy]]
            look = {"color": colour, "marker": "o", "markersize": 3}
            axes[0].plot(budgets, [o.hit_rate for o in mine], **look)
            axes[1].plot(budgets, [o.saved for o in mine], **look)
            axes[2].plot(range(1, WINDOWS + 1), mine[-1].windows, **look)
            ends[policy] = mine[-1].windows[-1], colour
        titles = ("Hits", "Encoding time saved", f"Hits at {largest / 1e9:.3g} GB")
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
    """Mean time to first token over the share of repeated chunks."""
    from blocktune.evaluation.report import style

    first = next(iter(by_recompute.values()))

    def draw(figure, ground) -> None:
        axis, ends = figure.subplots(), {}
        lines = [("no cache", 1, ":", [p.none_s for p in first])]
        lines.append(("prefix caching", 0, "-", [p.prefix_s for p in first]))
        for number, (recompute, points) in enumerate(by_recompute.items()):
            name = f"chunk reuse\n{recompute:.0%} recomputed"
            lines.append((name, 2 + number, "-", [p.reuse_s for p in points]))
        for name, colour, line, seconds in lines:
            colour = ground.series[colour]
            axis.plot([p.repeated for p in first], seconds, line, color=colour)
            ends[name] = seconds[-1], colour
        axis.set(xlabel="chunks seen before", ylabel="to the first token, s", ylim=(0, None))
        axis.set_xlim(0, first[-1].repeated)
        style.as_share(axis.xaxis)
        style.label_ends(axis, ends)

    return style.to_png(draw, path, height=3.0, width=5.6)
