"""Chooses a method's parameters on held-out questions: tries every point of a grid."""

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
from blocktune.parsing import entries, load_spec, mapping, read

OWN_KEYS = ("budget",)
"""Keys of a method's entry that a path without a dot may name; others are the preset's."""


class Point(NamedTuple):
    """One choice of values: its label, the values by path, and the method's entry."""

    label: str
    values: dict[str, Any]
    entry: dict[str, Any]


@dataclass(frozen=True)
class TuneSpec:
    """A tuning run.

    Raises:
        ValueError: If the grid is empty, a value is not a list, a method cannot be built, or the
            questions are of a test split.
    """

    model: str  # path or hub name of the base model
    method: Any  # a name, a composition as text, or an entry as in a suite
    # values to try, by what they are of: a parameter of the preset (``ratio``), ``budget``, or a
    # path into the entry (``layout.num_blanks``, ``select.deviation.ratio``)
    grid: Mapping[str, Any]
    task: TaskSpec  # held-out questions to choose by; its ``metric`` decides
    adapter: str | None = None  # folder of the adapter, or None
    dtype: str = "auto"  # of weights and caches
    quantize: str | None = None  # as in a suite
    device: str | None = None  # as in a suite
    seed: int = 0  # of the sign-flip test
    batch_size: int = 16  # prompts answered at a time

    def __post_init__(self):
        refuse_test(self.task.source)
        if not self.grid:
            raise ValueError("grid must name at least one parameter with its values")
        for path, values in self.grid.items():
            entries(values, f"grid '{path}'")
        for point in self.points():
            build_entry(point.entry)  # a wrong name or value is refused before anything runs

    def points(self) -> Iterator[Point]:
        """Every combination of the grid's values, the last path changing fastest."""
        for values in product(*self.grid.values()):
            chosen = dict(zip(self.grid, values, strict=True))
            label = ",".join(f"{path}={value}" for path, value in chosen.items())
            yield Point(label, chosen, _entry(self.method, chosen))

    def suite(self) -> Suite:
        """The run as a suite with a method per point, nothing timed."""
        keys = ("model", "dtype", "quantize", "device", "seed", "batch_size")
        methods = tuple(
            MethodSpec(**p.entry, adapter=self.adapter, label=p.label) for p in self.points()
        )
        given = {key: getattr(self, key) for key in keys}
        return Suite(**given, methods=methods, tasks=(self.task,), ttft=TtftSpec(num=0))


def load_tuning(path: str | Path) -> TuneSpec:
    """Reads a tuning run from strict YAML; see `load_spec` for its errors."""
    return load_spec(path, "tuning run", "see eval/tuning/ for examples", parse_tuning)


def parse_tuning(record: Any, where: str = "tuning run") -> TuneSpec:
    """Builds a run from decoded YAML; ``where`` opens every error, a ValueError."""
    values = dict(mapping(record, where))
    if "task" in values:
        values["task"] = parse_task(values["task"], f"{where}: task")
    return read(TuneSpec, values, where)


def refuse_test(source: str) -> None:
    """Raises ValueError for questions of a final comparison, see `is_test_split`."""
    name = source.partition("?")[0]
    if is_test_split(source, CATALOG[name].split if name in CATALOG else None):
        raise ValueError(
            f"'{source}' is a test split; parameters are tuned on held-out questions, such as "
            "'worlds:dev', and compared on the test split once"
        )


def _entry(method: Any, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The method's entry with the chosen values in it."""
    entry = {"name": method} if isinstance(method, str) else dict(mapping(method, "method"))
    entry = deepcopy(entry)
    entry.setdefault("name", entry.get("preset"))
    for path, value in chosen.items():
        first, *rest = str(path).split(".")
        keys = [first, *rest] if rest or first in OWN_KEYS else ["params", first]
        inner = entry
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
            if not isinstance(inner, dict):
                raise ValueError(f"grid '{path}': '{key}' must be a mapping, got {inner!r}")
        inner[keys[-1]] = value
    return entry


TUNED = "tuned.json"


def tune(
    spec: TuneSpec,
    output: str | Path,
    **how: Any,
) -> dict[str, Any] | None:
    """Tries every point; a stopped run resumes. ``how`` are other arguments of `run_suite`.

    Returns what ``tuned.json`` holds: ``best`` (values, entry, score with interval, cost), all
    ``points`` from best to worst, and the provenance; None in all processes but the main one. The
    best of several points is chosen by its score on these questions, so that score flatters it:
    measure it on others.
    """
    output = Path(output)
    results = run_suite(spec.suite(), output, **how)
    if results is None:
        return None
    kept = ("score", "score_ci95", "n", "recompute_ratio")
    points = [
        {"label": point.label, "values": point.values, "entry": point.entry}
        | {key: results["methods"][point.label][key] for key in kept}
        for point in spec.points()
    ]
    points.sort(key=lambda point: (-point["score"], point["recompute_ratio"]))
    task = {key: getattr(spec.task, key) for key in ("name", "source", "metric")}
    tuned = {"best": points[0], "points": points, "task": task}
    tuned |= {"provenance": results["provenance"]}
    replace_json(output / TUNED, tuned)
    return tuned
