"""Tunes a method's parameters on held-out questions by grid search."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from blocktune.data.sources.catalog import CATALOG, is_test_split
from blocktune.evaluation.runner import run_suite
from blocktune.evaluation.suite import MethodSpec, Suite, TaskSpec, TtftSpec, parse_task
from blocktune.files import replace_json
from blocktune.methods import build_entry
from blocktune.methods.method_parser import ENTRY_KEYS
from blocktune.parsing import entries, load_spec, mapping, read, refuse_doubles

TUNED = "tuned.json"


class Point(NamedTuple):
    """One point of the grid."""

    label: str  # such as ``ratio=0.2,budget=0.15``; names a file, so "_" stands for "/"
    values: dict[str, Any]  # chosen values by path
    entry: dict[str, Any]  # the method's entry with these values


@dataclass(frozen=True)
class TuneSpec:
    """A grid search over a method's parameters. ValueError: a test split, or an unknown method."""

    model: str  # path or Hub name of the base model
    method: Any  # a name, a composition as text, or an entry as in a suite
    # path -> list of values to try. A path is a parameter of the method (``ratio``), a key of the
    # entry (``layer_budget``, ``select``), or a path into it (``select.deviation.ratio``)
    grid: Mapping[str, Any]
    task: TaskSpec  # held-out questions; the best point has the highest mean of its ``metric``
    adapter: str | None = None  # folder of the adapter; None: the base model
    dtype: str = "auto"  # of weights and caches
    quantize: str | None = None  # as in `Suite`
    device: str | None = None  # as in `Suite`
    seed: int = 0  # of the sign-flip test
    batch_size: int = 16  # prompts answered at a time

    def __post_init__(self):
        refuse_test(self.task.source)
        if not self.grid:
            raise ValueError("grid must name at least one parameter with its values")
        for path, values in self.grid.items():
            texts = list(map(str, entries(values, f"grid '{path}'")))
            refuse_doubles(f"grid '{path}': value", texts, "try it once")
        for point in self.points():
            build_entry(point.entry)  # raises on a wrong name or value before anything runs

    def points(self) -> Iterator[Point]:
        """All combinations of the grid's values; the last path changes fastest."""
        for values in product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            label = ",".join(f"{path}={value}" for path, value in chosen.items())
            yield Point(label.replace("/", "_"), chosen, _entry(self.method, chosen))

    def suite(self) -> Suite:
        """The run as a suite with one method per point, without timing."""
        keys = ("model", "dtype", "quantize", "device", "seed", "batch_size")
        given = {key: getattr(self, key) for key in keys}
        specs = [MethodSpec(**p.entry, adapter=self.adapter, label=p.label) for p in self.points()]
        return Suite(**given, methods=tuple(specs), tasks=(self.task,), ttft=TtftSpec(num=0))


def load_tuning(path: str | Path) -> TuneSpec:
    """Reads a tuning run from strict YAML; raises as `load_spec`."""
    return load_spec(path, "tuning run", "see eval/tuning/ for examples", parse_tuning)


def parse_tuning(record: Any, where: str = "tuning run") -> TuneSpec:
    """Builds a run from decoded YAML. Messages of a ValueError begin with ``where``."""
    values = dict(mapping(record, where))
    if "task" in values:
        values["task"] = parse_task(values["task"], f"{where}: task")
    return read(TuneSpec, values, where)


def refuse_test(source: str) -> None:
    """Raises ValueError if ``source`` is a test split, see `is_test_split`."""
    name = source.partition("?")[0]
    if is_test_split(source, CATALOG[name].split if name in CATALOG else None):
        wanted = "parameters are tuned on held-out questions, such as 'worlds:dev'"
        raise ValueError(f"'{source}' is a test split; {wanted}, and compared on it once")


def _entry(method: Any, chosen: Mapping[str, Any]) -> dict[str, Any]:
    entry = {"name": method} if isinstance(method, str) else mapping(method, "method")
    entry = deepcopy(dict(entry))
    entry.setdefault("name", entry.get("preset"))
    for path, value in chosen.items():
        *outer, last = str(path).split(".")
        inner = entry
        for key in outer or ([] if last in ENTRY_KEYS else ["params"]):
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ValueError(f"grid '{path}': '{key}' must be a mapping, got {inner!r}")
        inner[last] = value
    return entry


def tune(spec: TuneSpec, output: str | Path, **how: Any) -> dict[str, Any] | None:
    """Evaluates every point of the grid. An interrupted run resumes.

    ``how`` is for `run_suite`. Returns the content of ``tuned.json``, or None except in the main
    process: the ``best`` point (values, entry, score with interval, cost), all ``points``, best
    first, the task and the provenance. The best score is biased upwards: measure it again on
    other questions.
    """
    results = run_suite(spec.suite(), output, **how)
    if results is None:
        return None
    points, kept = [], ("score", "score_ci95", "n", "recompute_ratio")
    for point in spec.points():
        found = results["methods"][point.label]
        points.append(point._asdict() | {key: found[key] for key in kept})
    points.sort(key=lambda point: (-point["score"], point["recompute_ratio"]))
    task = {key: getattr(spec.task, key) for key in ("name", "source", "metric")}
    tuned = {"best": points[0], "points": points, "task": task, "provenance": results["provenance"]}
    replace_json(Path(output) / TUNED, tuned)
    return tuned
