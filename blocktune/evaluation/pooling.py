"""Several training seeds of one method as one method: the mean over seeds, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from blocktune.evaluation.statistics import pooled
from blocktune.parsing import entries, mapping

if TYPE_CHECKING:
    from blocktune.evaluation.rows import Row

AVERAGED = ("em", "f1", "substring_em", "score", "recompute_ratio")
SEED = "{seed}"
"""Stands for the seed in the adapter's folder of an entry with ``seeds``."""


def spread_seeds(record: Any, where: str) -> tuple[list[Any], dict[str, list[str]]]:
    """Entries of methods with one entry for each of their ``seeds``, and the pools they make.

    ``{name: kvlink, adapter: "out/kvlink-{seed}", seeds: [0, 1]}`` is ``kvlink-0`` and
    ``kvlink-1``, pooled as ``kvlink``.

    Args:
        record: Decoded YAML: the list of a suite's methods.
        where: Opens every error.

    Raises:
        ValueError: If seeds are no list of numbers, or the adapter does not say where they go.
    """
    spread, pools = [], {}
    for index, entry in enumerate(entries(record, where)):
        if not isinstance(entry, Mapping) or "seeds" not in entry:
            spread.append(entry)
            continue
        own = _of_seeds(entry, f"{where}[{index}]")
        pools[entry.get("label") or entry.get("name")] = [one["label"] for one in own]
        spread += own
    return spread, pools


def _of_seeds(entry: Mapping, where: str) -> list[dict[str, Any]]:
    seeds = entries(entry["seeds"], f"{where}: seeds")
    adapter, label = entry.get("adapter"), entry.get("label") or entry.get("name")
    if any(type(seed) is not int for seed in seeds):
        raise ValueError(f"{where}: seeds must be a list of whole numbers, got {seeds!r:.60}")
    if not isinstance(adapter, str) or SEED not in adapter:
        raise ValueError(
            f"{where}: with seeds, 'adapter' must hold {SEED}, such as 'out/kvlink-{SEED}', got "
            f"{adapter!r:.60}"
        )
    kept = {key: value for key, value in entry.items() if key != "seeds"}
    return [
        kept | {"adapter": adapter.replace(SEED, str(seed)), "label": f"{label}-{seed}"}
        for seed in seeds
    ]


def check_pools(pools: Any, labels: Sequence[str]) -> None:
    """Refuses pools of what there is not.

    Raises:
        ValueError: If a pool is no list of at least two labels, or its name is taken.
    """
    for name, members in mapping(pools, "pool").items():
        if name in labels:
            raise ValueError(f"pool '{name}' has the label of a method; rename it")
        if not isinstance(members, list) or len(members) < 2 or not set(members) <= set(labels):
            raise ValueError(
                f"pool '{name}' must be a list of two or more method labels, got {members!r:.60}; "
                f"there are {', '.join(labels)}"
            )


def with_pools(
    rows: Mapping[str, Sequence[Row]], pools: Mapping[str, Sequence[str]]
) -> dict[str, Sequence[Row]]:
    """The rows with each pool in the place of its members.

    Questions stay the unit that intervals are over: three seeds are no three times the questions.
    Nor are they three methods: each comparison more would weaken Holm's correction of all others.

    Args:
        rows: Label -> rows of the same questions, in the same order.
        pools: Name -> labels.
    """
    found: dict[str, Sequence[Row]] = {}
    pool_of = {member: name for name, members in pools.items() for member in members}
    for label, own in rows.items():
        name = pool_of.get(label)
        if name is None:
            found[label] = own
        elif name not in found:
            found[name] = _mean_rows([rows[member] for member in pools[name]])
    return found


def mean_of(values: Sequence[Any]) -> Any:
    """The mean of numbers, or of lists or mappings of them part by part; None if one is None."""
    first = values[0]
    if any(value is None for value in values):
        return None
    if isinstance(first, Mapping):
        return {key: mean_of([value.get(key) for value in values]) for key in first}
    if isinstance(first, list):
        return [mean_of(parts) for parts in zip(*values, strict=True)]
    return fmean(values)


def _mean_rows(runs: Sequence[Sequence[Row]]) -> list[Row]:
    means = {
        name: pooled([[getattr(row, name) for row in run] for run in runs]).tolist()
        for name in AVERAGED
    }
    return [
        replace(row, scores=_scores([run[index] for run in runs]), **_at(means, index))
        for index, row in enumerate(runs[0])
    ]


def _at(means: Mapping[str, Sequence[float]], index: int) -> dict[str, float]:
    return {name: values[index] for name, values in means.items()}


def _scores(same: Sequence[Row]) -> dict[str, float]:
    return {name: fmean(row.scores[name] for row in same) for name in same[0].scores}
