"""Traces of requests in which the same chunks return: in other contexts, orders and mixes.

The benchmark that arXiv:2603.20218 asks for (section 6): what a cache of one state per chunk, of
several variants, or a tuned model makes of chunks that come back.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any

from blocktune.data import RagExample
from blocktune.evaluation.results import mean_of
from blocktune.evaluation.significance import difference, holm, mean_interval, p_value
from blocktune.evaluation.suite import MethodSpec, TaskSpec, check_pools, parse_methods, parse_task
from blocktune.parsing import entries, load_spec, mapping, read, refuse_doubles
from blocktune.prompt import Chunk

ORDERS = ("kept", "shuffled", "rotated")


@dataclass(frozen=True)
class Pattern:
    """How chunks return from one request to the next.

    Attributes:
        name: In results.
        order: ``kept``: as retrieved; ``shuffled``: differently in every request; ``rotated``: from
            another chunk on, evidence in its order and every chunk but the first after the one that
            it followed, for text in which chunks point back ("she").
        fresh: Share of a request's chunks, those with the evidence apart, that are exchanged for
            chunks of other questions, in [0, 1].
        popularity: Exponent of the Zipf law by which those are drawn; 0 draws all alike.
    """

    name: str
    order: str = "kept"
    fresh: float = 0.0
    popularity: float = 1.0

    def __post_init__(self):
        if self.order not in ORDERS:
            raise ValueError(f"order must be one of {', '.join(ORDERS)}, got '{self.order}'")
        if not 0 <= self.fresh <= 1:
            raise ValueError(f"fresh must be a share in [0, 1], got {self.fresh}")
        if self.popularity < 0:
            raise ValueError(f"popularity must not be negative, got {self.popularity}")


@dataclass(frozen=True)
class TraceSuite:
    """Traces, the methods that serve them, and the memory that they are given.

    Attributes:
        model: Path or hub name of the base model.
        task: What is asked; its questions return ``requests / questions`` times each.
        methods: What serves.
        patterns: How chunks return.
        questions: Different questions in a trace.
        requests: Requests of a trace.
        warmup: Requests at its start that fill the caches and do not count.
        store_mib: Memory for chunks, in MiB, each a run of its own; 0 is as much as is needed.
        dtype: Of weights and caches.
        device: Where to run; None takes a GPU when there is one.
        seed: Of the traces and of the sign-flip test.
        pool: As in a suite.
    """

    model: str
    task: TaskSpec
    methods: tuple[MethodSpec, ...]
    patterns: tuple[Pattern, ...]
    questions: int = 20
    requests: int = 100
    warmup: int = 20
    store_mib: tuple[int, ...] = (0,)
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    pool: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.questions < 1:
            raise ValueError(f"questions must be at least 1, got {self.questions}")
        if not 0 <= self.warmup < self.requests:
            raise ValueError(
                f"warmup must leave requests that count: below {self.requests}, got {self.warmup}"
            )
        if not self.store_mib or min(self.store_mib) < 0:
            raise ValueError(f"store_mib must hold sizes of at least 0, got {self.store_mib}")
        refuse_doubles("method label", [m.label for m in self.methods], "give one a 'label'")
        refuse_doubles("pattern", [p.name for p in self.patterns], "rename one")
        check_pools(self.pool, [m.label for m in self.methods])


def load_traces(path: str | Path) -> TraceSuite:
    """Reads a trace suite; see `load_spec` for its errors."""
    return load_spec(path, "trace suite", "see eval/study/suites/traces.yaml", parse_traces)


def parse_traces(record: Any, where: str = "traces") -> TraceSuite:
    """Builds a trace suite from decoded YAML.

    Raises:
        ValueError: If a key is unknown or missing, or a value is not accepted.
    """
    values = dict(mapping(record, where))
    if "task" in values:
        values["task"] = parse_task(values["task"], f"{where}: task")
    if "methods" in values:
        values["methods"], seeds = parse_methods(values["methods"], f"{where}: methods")
        values["pool"] = seeds | values.get("pool", {})
    if "patterns" in values:
        found = enumerate(entries(values["patterns"], f"{where}: patterns"))
        values["patterns"] = tuple(_pattern(e, f"{where}: patterns[{i}]") for i, e in found)
    return read(TraceSuite, values, where)


def _pattern(record: Any, where: str) -> Pattern:
    return read(Pattern, record, where)


def make_trace(
    examples: Sequence[RagExample], pattern: Pattern, requests: int, seed: int
) -> list[RagExample]:
    """The requests of one trace, in order.

    Every question returns equally often. Its evidence is always among its chunks; the others are
    its own or, by the pattern, popular ones of other questions.

    Args:
        examples: The questions, each with its chunks and which of them hold the evidence.
        pattern: How chunks return.
        requests: How many.
        seed: Equal seeds give equal traces, and all methods the same one.
    """
    rng = Random(f"trace/{pattern.name}/{seed}")
    pool = list(dict.fromkeys(chunk for example in examples for chunk in example.chunks))
    rng.shuffle(pool)
    weights = [1 / (rank + 1) ** pattern.popularity for rank in range(len(pool))]
    order = [index % len(examples) for index in range(requests)]
    rng.shuffle(order)
    return [_request(examples[index], pattern, pool, weights, rng) for index in order]


def _request(
    example: RagExample,
    pattern: Pattern,
    pool: Sequence[Chunk],
    weights: Sequence[float],
    rng: Random,
) -> RagExample:
    chunks = list(example.chunks)
    evidence = {chunks[index] for index in example.supporting}
    others = [index for index, chunk in enumerate(chunks) if chunk not in evidence]
    for index in rng.sample(others, round(pattern.fresh * len(others))):
        chunks[index] = _drawn(pool, weights, set(chunks), rng)
    if pattern.order == "shuffled":
        rng.shuffle(chunks)
    if pattern.order == "rotated":
        chunks = _rotated(chunks, evidence, rng)
    supporting = tuple(index for index, chunk in enumerate(chunks) if chunk in evidence)
    return replace(example, chunks=tuple(chunks), supporting=supporting)


def _rotated(chunks: Sequence[Chunk], evidence: set[Chunk], rng: Random) -> list[Chunk]:
    """The chunks from another one on; never cut between the first and the last of the evidence."""
    places = [index for index, chunk in enumerate(chunks) if chunk in evidence]
    inside = range(min(places) + 1, max(places) + 1)
    start = rng.choice([index for index in range(len(chunks)) if index not in inside])
    return [*chunks[start:], *chunks[:start]]


def _drawn(
    pool: Sequence[Chunk], weights: Sequence[float], taken: set[Chunk], rng: Random
) -> Chunk:
    free = [
        (chunk, weight) for chunk, weight in zip(pool, weights, strict=True) if chunk not in taken
    ]
    if not free:
        raise ValueError(
            f"a trace needs chunks of several questions to mix, the task has only {len(pool)}; "
            "raise 'questions' or lower 'fresh'"
        )
    [chosen] = rng.choices([chunk for chunk, _ in free], [weight for _, weight in free])
    return chosen


def reuse_of(trace: Sequence[RagExample]) -> Mapping[str, float]:
    """How much returns: chunks in all, the share seen before, and the share in the same context."""
    seen: set[Chunk] = set()
    last: dict[Chunk, tuple[Chunk, ...]] = {}
    met = again = same = 0
    for request in trace:
        for index, chunk in enumerate(request.chunks):
            before = request.chunks[:index]
            met += 1
            again += chunk in seen
            same += last.get(chunk) == before
            seen.add(chunk)
            last[chunk] = before
    return {"chunks": met, "returning": again / met, "same_context": same / met}


SPENT = ("stored_bytes", "hit_rate", "recompute_ratio", "ttft_s")


def summed_up(
    served: Sequence[Mapping[str, Any]], pools: Mapping[str, Sequence[str]], seed: int
) -> list[dict[str, Any]]:
    """The cells of one trace; all of them answered the same requests, so differences are paired.

    Questions are the unit that intervals are over, the mean of a question's returns its score: to
    be asked ten times does not make ten questions of one.

    Args:
        served: Per method and size of memory its ``scores``, one a question, and what it spent.
        pools: Name -> labels of methods that differ in a seed only.
        seed: Of the sign-flip test.

    Returns:
        With ``score``, ``ci95``, ``n`` (requests), ``questions``, ``seeds`` and ``minus``: method
        -> ``mean``, ``ci95``, ``p`` and Holm's ``p_holm``, in the same size of memory.
    """
    found = []
    for mib in dict.fromkeys(cell["store_mib"] for cell in served):
        cells = _pooled([cell for cell in served if cell["store_mib"] == mib], pools)
        scores = {label: cell["scores"] for label, cell in cells.items()}
        minus = _minus(scores, seed)
        for label, cell in cells.items():
            score = mean_interval(scores[label])
            own = {"method": label, "score": score.mean, "ci95": score.ci95}
            own["questions"] = len(scores[label])
            kept = {key: cell[key] for key in ("n", "adapter", "store_mib", "seeds", *SPENT)}
            found.append(own | kept | {"minus": minus[label]})
    return found


def _pooled(
    cells: Sequence[Mapping[str, Any]], pools: Mapping[str, Sequence[str]]
) -> dict[str, dict[str, Any]]:
    by_label = {cell["method"]: cell for cell in cells}
    pool_of = {member: name for name, members in pools.items() for member in members}
    found: dict[str, dict[str, Any]] = {}
    for label, cell in by_label.items():
        name = pool_of.get(label, label)
        if name not in found:
            members = [by_label[one] for one in pools.get(name, [label])]
            seeds = {one["method"]: mean_of(one["scores"]) for one in members if name != label}
            spent = mean_of([{key: one[key] for key in (*SPENT, "scores")} for one in members])
            found[name] = {**cell, **spent, "seeds": seeds}
    return found


def _minus(scores: Mapping[str, Sequence[float]], seed: int) -> dict[str, dict[str, Any]]:
    labels = list(scores)
    pairs = {
        (one, other): p_value(scores[one], scores[other], seed=seed)
        for index, one in enumerate(labels)
        for other in labels[index + 1 :]
    }
    adjusted = holm(pairs)
    found: dict[str, dict[str, Any]] = {label: {} for label in labels}
    for (one, other), p in pairs.items():
        for left, right in ((one, other), (other, one)):
            above = difference(scores[left], scores[right])
            p_values = {"p": p, "p_holm": adjusted[one, other]}
            found[left][right] = {"mean": above.mean, "ci95": above.ci95, **p_values}
    return found
