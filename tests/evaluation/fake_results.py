"""Results as `build_results` makes them, without a model."""

import functools

from blocktune.evaluation.results import build_results
from blocktune.evaluation.rows import Row
from blocktune.evaluation.suite import parse_suite
from blocktune.evaluation.ttft import TtftSummary

KINDS = ("self-contained", "cross-chunk", "2-hop", "comparison")
METHODS = {  # label -> exact match of every kind in %, recomputed share, time to first token
    "full-prefill": ((97, 93, 81, 78), 1.0, 0.040),
    "no-context": ((3, 4, 2, 21), 0.0, 0.004),
    "naive": ((94, 52, 44, 60), 0.0, 0.010),
    "block-attention": ((96, 88, 78, 74), 0.0, 0.010),
    "kvlink": ((97, 92, 79, 76), 0.0, 0.012),
    "cacheblend": ((95, 70, 61, 65), 0.15, 0.019),
    "epic": ((94, 61, 55, 64), 0.1, 0.015),
}


def fake_suite():
    adapters = {"block-attention": "out/block", "kvlink": "out/kvlink"}
    methods = [{"name": n, "adapter": adapters.get(n)} for n in METHODS]
    tasks = [{"name": "worlds", "source": "worlds:test?n=400"}]
    return parse_suite({"model": "data/tiny", "methods": methods, "tasks": tasks})


def fake_rows() -> dict[str, list[Row]]:
    return {
        label: [
            _row(kind, index, float((37 * index) % 100 < percent), recomputed)
            for kind, percent in reversed(list(zip(KINDS, percents, strict=True)))
            for index in range(100)
        ]
        for label, (percents, recomputed, _) in METHODS.items()
    }


@functools.cache
def fake_results() -> dict:
    ttft = {n: TtftSummary(s, 0.9 * s, 1.1 * s, 20, 800) for n, (_, _, s) in METHODS.items()}
    return build_results(fake_suite(), fake_rows(), ttft, {"command": "test", "seed": 0})


def _row(kind: str, index: int, right: float, recomputed: float) -> Row:
    text = "yes" if right else "no"
    key = f"{kind}-{index}"
    return Row(
        key, "worlds", key, kind, text, text, right, right, right, recomputed, {}, score=right
    )
