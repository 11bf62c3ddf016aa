"""What differs, beyond chance: two runs in a table, one run in sentences."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations
from operator import gt, lt
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from blocktune.evaluation.results import FLOOR, ORACLE, RESULTS, plain_label, with_pools
from blocktune.evaluation.rows import Row, read_all
from blocktune.evaluation.significance import ALPHA, difference, holm, p_value, power
from blocktune.parsing import load_json
from blocktune.tables import Table, with_interval, written


class Change(NamedTuple):
    """One method in two runs, B minus A over the ``n`` questions that both answered."""

    label: str
    n: int
    before: float  # score in A
    after: float  # score in B
    mean: float  # the difference, with its interval ``ci95``
    ci95: list[float]
    p: float  # for this comparison alone; ``p_holm``: for all methods of the table together
    p_holm: float
    wins: int  # questions on which B is better; ``losses``: on which A is
    losses: int
    n_needed: int | None  # questions that would show this difference, or None


def load_results(folder: str | Path) -> dict[str, Any]:
    """Reads ``results.json`` of a finished run; raises ValueError if the folder has none."""
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise ValueError(f"no {RESULTS} in '{folder}'; give the --output of a finished run")
    record = load_json(path)
    if not isinstance(record, dict) or not isinstance(record.get("methods"), dict):
        raise ValueError(f"{path}: not a {RESULTS} of `blocktune eval`; it has no 'methods'")
    return record


def compare(before: str | Path, after: str | Path, *, seed: int = 0) -> list[Change]:
    """Compares the methods that the runs in two folders share; ValueError if there is none."""
    old, new = load_results(before)["methods"], load_results(after)["methods"]
    shared = [label for label in old if label in new]
    if not shared:
        raise ValueError(
            f"the runs share no method: '{before}' has {', '.join(old)}; '{after}' has "
            f"{', '.join(new)}"
        )
    left, right = _rows(before, old, shared), _rows(after, new, shared)
    pairs = {}
    for label in shared:
        a, b = _scores(left[label]), _scores(right[label])
        if not (both := [key for key in b if key in a]):
            raise ValueError(
                f"the runs asked '{label}' no common question; compare runs of one task"
            )
        pairs[label] = [a[key] for key in both], [b[key] for key in both]
    p = {label: p_value(b, a, seed=seed) for label, (a, b) in pairs.items()}
    adjusted, changes = holm(p), []
    for label, (a, b) in pairs.items():
        above, able = difference(b, a), power(b, a, p[label], adjusted[label])
        wins, losses = sum(map(gt, b, a)), sum(map(lt, b, a))
        tested = p[label], adjusted[label], wins, losses, able and able.n_needed
        changes.append(Change(label, len(a), fmean(a), fmean(b), above.mean, above.ci95, *tested))
    return changes


def _rows(
    folder: str | Path, methods: Mapping[str, Any], labels: Sequence[str]
) -> dict[str, Sequence[Row]]:
    """Rows of a run by label; for pooled seeds, their means."""
    pools = {label: list(seeds) for label in labels if (seeds := methods[label].get("seeds"))}
    read = [one for label in labels for one in pools.get(label, [label])]
    return with_pools(read_all(Path(folder), read), pools)


def _scores(rows: Sequence[Row]) -> dict[tuple[str, str, int], float]:
    """Scores by task, identifier and, since a source may repeat it, how often it came before."""
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for row in rows:
        name = (row.task, row.id)
        found[*name, seen[name]] = row.score
        seen[name] += 1
    return found


def compare_table(changes: Sequence[Change], names: Mapping[str, str]) -> Table:
    """What `compare` returned as a table; ``names`` holds the headings ``before`` and ``after``."""
    headings = ("method", names["before"], names["after"], "difference", "+/-", "p", "n", "verdict")
    note = (
        "Score in %; the difference with its own 95 % interval; p and verdict after Holm's "
        "correction for all rows."
    )
    rows = [
        (
            c.label,
            *(written("score", score) for score in (c.before, c.after)),
            with_interval("points", c.mean, c.ci95),
            f"{c.wins}/{c.losses}",
            written("p", c.p_holm),
            written("count", c.n),
            verdict(c.mean, c.p_holm, c.n, c.n_needed),
        )
        for c in changes
    ]
    return Table(headings, rows, note=note, left=("verdict",))


def verdict(mean: float, p: float, n: int, needed: int | None) -> str:
    """The verdict on a difference: real, none, or too few questions to tell."""
    if mean == 0:
        return "the same"
    if p < ALPHA:
        return "differs"
    if needed is not None and needed > n:
        return f"chance at this n; needs about {needed:,}"
    return "within chance"


MOST = 8  # methods that are worth a sentence each; more are worth a table


def findings(results: Mapping[str, Any]) -> list[str]:
    """Sentences about results: what naive reuse loses, what each other method wins back.

    A difference counts as real if Holm's p over all pairs of the run is below `ALPHA`, as in the
    tables' verdicts and in `power_notes`. Methods with an adapter are also compared with one
    another. Of more than `MOST` methods only those are named that nothing beats at less
    recomputation. Without both baselines there is nothing to say.
    """
    methods = results["methods"]
    full, naive = (plain_label(results, name) for name in (ORACLE, FLOOR))
    if full is None or naive is None:
        return []
    titles = {task["title"] for task in results["tasks"].values()}
    named = titles.pop() if len(titles) == 1 else "score"
    lost = methods[full]["score_minus"][naive]
    points = f"{with_interval('score', lost['mean'], lost['ci95'])} points of {named}"
    if is_shown(lost) and lost["mean"] > 0:
        by_kind = ", ".join(
            f"{written('score', methods[full]['tasks'][kind]['score'] - cell['score'])} on {kind}"
            for kind, cell in methods[naive]["tasks"].items()
        )
        said = [f"Naive reuse loses {points} ({by_kind})."]
        others = [n for n in methods if methods[n]["method"] != "no-context"]
        others = [n for n in others if n not in (full, naive)]
        front = results["budget"]["pareto"]["recompute_ratio"]
        shown = others if len(others) <= MOST else [n for n in front if n in others]
        said += [_gain(methods[label], label) for label in shown]
        if rest := len(others) - len(shown):
            said.append(
                f"{rest} other methods score no higher than one of these, or than a baseline, that "
                "recomputes no more; the table holds them."
            )
    else:
        p = f"p = {lost['p_holm']:.2g}, corrected for all pairs"
        chance = "" if is_shown(lost) else f", within chance ({p})"
        said = [f"Full prefill minus naive reuse: {points}{chance}."]
    tuned = [label for label, summary in methods.items() if summary["adapter"]]
    for other, label in combinations(tuned, 2) if len(tuned) <= MOST else ():
        found = methods[label]["score_minus"][other]
        chance = "" if is_shown(found) else ": within chance at this number of questions"
        points = with_interval("score", found["mean"], found["ci95"])
        said.append(f"{label} minus {other}: {points} points{chance}.")
    return said


def _gain(summary: Mapping[str, Any], label: str) -> str:
    closed, ci95 = summary["score_gap_recovered"], summary["score_gap_recovered_ci95"]
    if closed is None:
        return f"{label}: the gap is too uncertain for a share of it."
    share = with_interval("gap", closed, ci95) if closed >= 0 else "none"
    fresh, ratio = summary["recompute_ratio"], summary["ttft_over_full_prefill"]
    cost = f"recomputing {100 * fresh:.0f} % of the context" if fresh else "recomputing nothing"
    time = f", first token after {ratio:.2f} of full prefill's time" if ratio else ""
    return f"{label} closes {share} of that gap, {cost}{time}."


def is_shown(difference: Mapping[str, Any]) -> bool:
    """Whether a difference of results is more than chance, all pairs of the run considered."""
    return difference["p_holm"] < ALPHA


def power_notes(results: Mapping[str, Any]) -> list[str]:
    """Sentences about what this many questions cannot tell apart.

    Methods are compared with full prefill and naive reuse; a difference that Holm's correction
    leaves within chance is named with the number of questions that would show it.
    """
    notes = []
    for other in filter(None, (plain_label(results, name) for name in (ORACLE, FLOOR))):
        unclear = [
            (label, minus["mean"], minus["n_needed"])
            for label, summary in results["methods"].items()
            if (minus := summary["score_minus"].get(other))
            and not is_shown(minus)
            and (minus["n_needed"] or 0) > summary["n"]
        ]
        if unclear:
            named = "; ".join(
                f"{n} ({written('score', mean)} points; {needed:,} would be enough)"
                for n, mean, needed in unclear
            )
            count = next(iter(results["methods"].values()))["n"]
            notes.append(f"{count:,} questions are too few to tell from {other}: {named}.")
    return notes
