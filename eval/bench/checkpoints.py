"""Placement of recurrent-state checkpoints along a prompt: optimal placement against simple rules.

    python eval/bench/checkpoints.py --output eval/results/bench/checkpoints.png

Draws the figure of sparse prefix caching (arXiv:2605.05219): recomputed tokens of a prompt against
checkpoints per cached entry, for questions over a document and for system prompts that diverge.
Placements are learned from the first half of a trace and evaluated on the second. No model runs.
"""

import argparse
import json
from collections import Counter
from itertools import accumulate
from pathlib import Path
from random import Random
from statistics import fmean
from typing import NamedTuple

from blocktune.cache.exact import place_checkpoints
from blocktune.evaluation.report.style import Ground, to_png

BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
BLOCKS = (4096, 2048, 1024, 512, 256)


class Entry(NamedTuple):
    """A cached prompt, and the number of its tokens that each later request shares."""

    num_tokens: int
    depths: list[int]  # shared tokens, by request


def document(rng: Random, requests: int) -> Entry:
    """Questions over a document: 40 % share all of it, the others the text up to a section's end.

    Sections have 200 to 1,200 tokens; early ones are asked about more often (a Zipf law). 10 % of
    the other requests diverge within a section.
    """
    ends = list(accumulate(rng.randint(200, 1200) for _ in range(rng.randint(4, 24))))
    weights = [1 / rank for rank in range(1, len(ends) + 1)]

    def depth() -> int:
        if rng.random() < 0.4:
            return ends[-1]
        end = rng.choices(ends, weights)[0]
        return end - rng.randint(1, 150) if rng.random() < 0.1 else end

    return Entry(ends[-1], [depth() for _ in range(requests)])


def system_prompt(rng: Random, requests: int) -> Entry:
    """Variants of a system prompt, edited at one of ten places, some more popular than others.

    A request shares the text before the edit; 20 % of requests are edited at a random place.
    """
    length = rng.randint(1000, 8000)
    places = rng.sample(range(50, length), 10)
    popularity = [rng.paretovariate(1.0) for _ in places]

    def depth() -> int:
        if rng.random() < 0.2:
            return rng.randint(0, length)
        return rng.choices(places, popularity)[0]

    return Entry(length, [depth() for _ in range(requests)])


def placements(entry: Entry) -> dict[str, list[tuple[int, ...]]]:
    """Checkpoints of an entry by rule, for each setting. Only the first two rules see requests."""
    tokens, half = entry.num_tokens, len(entry.depths) // 2
    seen, later = Counter(entry.depths[:half]), Counter(entry.depths[half:])
    return {
        "dynamic programme": [place_checkpoints(seen, budget) for budget in BUDGETS],
        "best, knowing all": [place_checkpoints(later, budget) for budget in BUDGETS],
        "evenly": [tuple(tokens * (i + 1) // m for i in range(m)) for m in BUDGETS],
        "halving": [tuple({tokens >> i for i in range(m)} - {0}) for m in BUDGETS],
        "blocks": [tuple(range(size, tokens + 1, size)) for size in BLOCKS],
    }


def recomputed_tokens(weights: Counter, checkpoints: tuple[int, ...]) -> float:
    """Mean number of shared tokens after the last checkpoint that a request can use."""
    starts = (0, *checkpoints)
    deepest = {depth: max(start for start in starts if start <= depth) for depth in weights}
    total = sum(weight * (depth - deepest[depth]) for depth, weight in weights.items())
    return total / weights.total()


def measure(entries: list[Entry]) -> dict[str, list[tuple[float, float]]]:
    """Points of each rule: mean checkpoints per entry, and mean tokens recomputed."""
    lines: dict[str, list[list[tuple[int, float]]]] = {}
    for entry in entries:
        later = Counter(entry.depths[len(entry.depths) // 2 :])
        for rule, by_setting in placements(entry).items():
            points = [(len(places), recomputed_tokens(later, places)) for places in by_setting]
            lines.setdefault(rule, []).append(points)
    return {
        rule: [tuple(map(fmean, zip(*points, strict=True))) for points in zip(*runs, strict=True)]
        for rule, runs in lines.items()
    }


COLOURS = {"dynamic programme": 3, "evenly": 1, "halving": 5, "blocks": 2, "best, knowing all": 0}
"""Index of each rule's colour in the palette."""


def draw(results: dict, path: Path) -> Path:
    """Draws a panel for each trace."""

    def panels(figure, ground: Ground) -> None:
        axes = figure.subplots(1, len(results), sharey=True)
        for axis, (name, lines) in zip(axes, results.items(), strict=True):
            for rule, points in lines.items():
                colour = ground.series[COLOURS[rule]]
                bound = rule.startswith("best")
                style = {"linestyle": ":", "marker": ""} if bound else {"marker": "o"}
                axis.plot(*zip(*points, strict=True), color=colour, markersize=3, **style)
            axis.set_xscale("log", base=2)
            axis.set_yscale("log")
            axis.set_ylim(bottom=1)
            for own in (axis.xaxis, axis.yaxis):
                own.set_major_formatter("{x:g}")
                own.set_minor_formatter("")
            axis.set_xlabel("checkpoints of an entry")
            axis.set_title(name)
        axes[0].set_ylabel("tokens computed again, mean")
        axes[0].legend(list(next(iter(results.values()))), frameon=False, fontsize=8)

    return to_png(panels, path, height=3.2, width=8.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=30)
    parser.add_argument("--requests", type=int, default=400, help="per entry")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("eval/results/bench/checkpoints.png"))
    args = parser.parse_args()
    makers = {"questions over a document": document, "system prompts": system_prompt}
    rng = Random(args.seed)
    results = {
        name: measure([make(rng, args.requests) for _ in range(args.entries)])
        for name, make in makers.items()
    }
    draw(results, args.output)
    print(json.dumps(results))


if __name__ == "__main__":
    main()
