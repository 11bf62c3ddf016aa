"""Where to keep recurrent states along a prompt: optimal placement against the usual rules.

    python eval/bench/checkpoints.py --output eval/results/bench/checkpoints.png

Draws the figure of sparse prefix caching (arXiv:2605.05219): tokens that a prompt computes again
against the checkpoints of a cached entry, for questions over one document and for system prompts
that turn off from each other. Placements are learnt from the first half of a trace and judged on
the other; traces are made by a seed, and no model runs.
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
from blocktune.evaluation.report.style import SERIES, to_png

BUDGETS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
BLOCKS = (4096, 2048, 1024, 512, 256)


class Entry(NamedTuple):
    """A cached prompt, and how deep each later request shares it."""

    num_tokens: int
    depths: list[int]


def document(rng: Random, requests: int) -> Entry:
    """Questions over a document: two in five share all of it, the others what is before a section.

    Sections have 200 to 1,200 tokens; early ones are asked about more often (a Zipf law). One
    request in ten turns off within a section.
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
    """Variants of a system prompt: edited at one of its settings, a few of them often.

    A request shares what is before the edit; one in five is edited anywhere.
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
    """What each rule keeps of an entry at each of its settings; only the first two saw requests."""
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
    """Mean tokens between the deepest checkpoint that serves a prompt and its shared depth."""
    placed = (0, *checkpoints)
    deepest = {depth: max(point for point in placed if point <= depth) for depth in weights}
    total = sum(weight * (depth - deepest[depth]) for depth, weight in weights.items())
    return total / weights.total()


def measure(entries: list[Entry]) -> dict[str, list[tuple[float, float]]]:
    """Of each rule its points: checkpoints of an entry and tokens computed again, means."""
    lines: dict[str, list[list[tuple[int, float]]]] = {}
    for entry in entries:
        later = Counter(entry.depths[len(entry.depths) // 2 :])
        for rule, made in placements(entry).items():
            points = [(len(points), recomputed_tokens(later, points)) for points in made]
            lines.setdefault(rule, []).append(points)
    return {
        rule: [tuple(map(fmean, zip(*points, strict=True))) for points in zip(*own, strict=True)]
        for rule, own in lines.items()
    }


COLOURS = {"dynamic programme": 3, "evenly": 1, "halving": 5, "blocks": 2, "best, knowing all": 0}
"""Of each rule, its place in the palette."""


def draw(results: dict, path: Path) -> Path:
    """A panel for each trace."""

    def panels(figure) -> None:
        axes = figure.subplots(1, len(results), sharey=True)
        for one, (name, lines) in zip(axes, results.items(), strict=True):
            for rule, points in lines.items():
                colour = SERIES[COLOURS[rule]]
                bound = rule.startswith("best")
                style = {"linestyle": ":", "marker": ""} if bound else {"marker": "o"}
                one.plot(*zip(*points, strict=True), color=colour, markersize=3, **style)
            one.set_xscale("log", base=2)
            one.set_yscale("log")
            one.set_ylim(bottom=1)
            one.xaxis.set_major_formatter("{x:g}")
            one.set_xlabel("checkpoints of an entry")
            one.set_title(name)
        axes[0].set_ylabel("tokens computed again, mean")
        axes[0].legend(list(next(iter(results.values()))), frameon=False, fontsize=8)

    return to_png(panels, path, height=3.2, width=8.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--entries", type=int, default=30)
    parser.add_argument("--requests", type=int, default=400, help="of each entry")
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
