"""Several training seeds of one method as one method: the mean over seeds, question by question."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import TYPE_CHECKING, Any

from blocktune.evaluation.significance import pooled

if TYPE_CHECKING:
    from blocktune.evaluation.rows import Row

AVERAGED = ("em", "f1", "substring_em", "score", "recompute_ratio")


def check_pools(pools: Mapping[str, Any], labels: Sequence[str]) -> None:
    """Refuses pools of what there is not.

    Raises:
        ValueError: If a pool is no list of at least two labels, or its name is taken.
    """
    for name, members in pools.items():
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
    """The rows with those of each pool after its last member.

    Questions stay the unit that intervals are over: three seeds are no three times the questions.

    Args:
        rows: Label -> rows of the same questions, in the same order.
        pools: Name -> labels.
    """
    found: dict[str, Sequence[Row]] = dict(rows)
    for name, members in pools.items():
        found[name] = _mean_rows([rows[member] for member in members])
    return found


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
