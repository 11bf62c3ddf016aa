"""Tests differences for significance: between two runs, and between the methods of one run."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import chain, combinations, product
from operator import itemgetter
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from blocktune.evaluation.results import FLOOR, ORACLE, RESULTS, plain_label, with_pools
from blocktune.evaluation.rows import Row, read_all
from blocktune.evaluation.significance import ALPHA, comparisons, paired
from blocktune.parsing import load_json
from blocktune.tables import Table, with_interval, written

MOST = 8  # up to this many methods get a sentence each
MOST_PAIRS = 3  # of more pairs of tuned methods, only those that differ get a sentence
MOST_NOTED = 3  # up to this many methods are named in a sentence about too few questions


class Change(NamedTuple):
    """One method in two runs, A and B, compared on the questions that both answered."""

    label: str
    n: int  # number of common questions
    before: float  # score in A
    after: float  # score in B
    mean: float  # B minus A
    ci95: list[float]  # its 95 % interval
    p: float  # p-value of this comparison alone
    p_holm: float  # p-value after Holm's correction for all methods that are compared
    wins: int  # questions on which B is better
    losses: int  # questions on which A is better
    n_needed: int | None  # questions that would be enough to show this difference, or None


def load_results(folder: str | Path) -> dict[str, Any]:
    """Reads ``results.json`` of a finished run; raises ValueError if the folder has none."""
    path = Path(folder) / RESULTS
    if not path.is_file():
        raise ValueError(f"no {RESULTS} in '{folder}'; give the --output of a finished run")
    record = load_json(path)
    for key in ("methods", "tasks", "budget", "sweeps", "provenance"):
        if not isinstance(record, dict) or not isinstance(record.get(key), dict):
            raise ValueError(f"{path}: not a {RESULTS} of `blocktune eval`; it has no '{key}'")
    return record


def compare(before: str | Path, after: str | Path, *, seed: int = 0) -> list[Change]:
    """Compares the methods that two runs share.

    Raises ValueError if there is none, or a task has another metric or version in each run.
    """
    first, second = load_results(before), load_results(after)
    shared = first["tasks"].keys() & second["tasks"].keys()
    for task, key in product(sorted(shared), ("metric", "version")):
        old, new = (run["tasks"][task].get(key) for run in (first, second))
        if old != new:
            which = f"the {key} {old} in '{before}' and {new} in '{after}'"
            raise ValueError(f"task '{task}' has {which}; answer both runs with the same {key}")
    old, new = first["methods"], second["methods"]
    if not (shared := [label for label in old if label in new]):
        has = f"'{before}' has {', '.join(old)}; '{after}' {', '.join(new)}"
        raise ValueError(f"the runs share no method: {has}")
    left, right = _rows(before, old, shared), _rows(after, new, shared)
    pairs, changes = {}, []
    for label in shared:
        a, b = _scores(left[label], right[label])
        common = [zip(b[key], a[key], strict=False) for key in b if key in a]
        if not (both := list(chain(*common))):
            raise ValueError(f"the runs have no common question for '{label}'; compare one task")
        pairs[label] = tuple(zip(*both, strict=True))
    for label, test in comparisons(pairs, seed).items():
        b, a = pairs[label]
        gains = paired(b, a)
        found = {key: value for key, value in test.items() if key in Change._fields}
        found |= {"wins": int((gains > 0).sum()), "losses": int((gains < 0).sum())}
        changes.append(Change(label, len(a), fmean(a), fmean(b), **found))
    return changes


def _rows(
    folder: str | Path, methods: Mapping[str, Any], labels: Sequence[str]
) -> dict[str, Sequence[Row]]:
    pools = {label: list(seeds) for label in labels if (seeds := methods[label].get("seeds"))}
    members = {member: label for label in labels for member in pools.get(label, [label])}
    rows = read_all(Path(folder), list(members))
    for member, label in members.items():
        if (found := len(rows[member])) != methods[label].get("n", found):
            counted = f"but its {RESULTS} counts {methods[label]['n']}"
            fix = "repeat the command of that run to complete it"
            raise ValueError(f"'{folder}' has {found} rows of '{member}', {counted}; {fix}")
    return with_pools(rows, pools)


def _scores(*runs: Sequence[Row]) -> list[Mapping[Any, list[float]]]:
    """Scores of each run by task and id; by the prompt too if a run has several rows of that id."""
    counts = [Counter((row.task, row.id) for row in rows) for rows in runs]
    repeated = {name for count in counts for name in count if count[name] > 1}
    scores = [defaultdict(list) for _ in runs]
    for own, rows in zip(scores, runs, strict=True):
        for row in rows:
            name = row.task, row.id
            own[name, name in repeated and row.prompt_hash].append(row.score)
    return scores


def compare_table(changes: Sequence[Change], before: Path, after: Path) -> Table:
    """The result of `compare` as a table. The runs are named by their folders, or else paths."""
    names = before.resolve().name, after.resolve().name
    names = names if names[0] != names[1] else (str(before), str(after))
    headings = ("method", *names, "difference", "+/-", "p", "n", "verdict")
    note = "Score in %; difference with its 95 % interval (not corrected); p and verdict after "
    note += "Holm's correction for all rows."
    rows = []
    for c in changes:
        scores = written("score", c.before), written("score", c.after)
        difference = with_interval("points", c.mean, c.ci95), f"{c.wins}/{c.losses}"
        tested = written("p", c.p_holm), written("count", c.n)
        said = verdict(c.mean, c.p_holm, c.n, c.n_needed)
        rows.append((c.label, *scores, *difference, *tested, said))
    return Table(headings, rows, note=note, left=("verdict",))


def verdict(mean: float, p: float, n: int, needed: int | None) -> str:
    """Says in words whether a difference is significant, or needs more questions to tell."""
    if mean == 0:
        return "the same"
    if p < ALPHA:
        return "differs"
    more = f"; needs about {needed:,} questions" if needed is not None and needed > n else ""
    return f"within chance{more}"


def findings(results: Mapping[str, Any]) -> list[str]:
    """Sentences about results: what naive reuse loses, and how much of it other methods recover.

    Methods with an adapter are also compared with each other. Of more than `MOST` methods, those on
    the Pareto front are named. Without a baseline there are no sentences.
    """
    methods = results["methods"]
    full, naive = (plain_label(results, name) for name in (ORACLE, FLOOR))
    if full is None or naive is None:
        return []
    titles = {task["title"] for task in results["tasks"].values()}
    named = titles.pop() if len(titles) == 1 else "score"
    lost = methods[full]["score_minus"][naive]
    points = f"{with_interval('score', lost['mean'], lost['ci95'])} points of {named}"
    if not is_shown(lost) or lost["mean"] <= 0:
        p = f"p = {lost['p_holm']:.2g}, corrected for all pairs"
        chance = "" if is_shown(lost) else f", within chance ({p})"
        return [f"Full prefill minus naive reuse: {points}{chance}.", *_between_tuned(methods)]
    by_kind = ", ".join(
        f"{written('score', methods[full]['tasks'][kind]['score'] - cell['score'])} on {kind}"
        for kind, cell in methods[naive]["tasks"].items()
    )
    others = [n for n, m in methods.items() if m["method"] != "no-context"]
    others = [n for n in others if n not in (full, naive)]
    front = results["budget"]["pareto"]["recompute_ratio"]
    shown = others if len(others) <= MOST else [n for n in front if n in others]
    said = [f"Naive reuse loses {points} ({by_kind})."]
    said += [_gain(methods[label], label) for label in shown]
    if rest := len(others) - len(shown):
        better = "one of these, or a baseline, that recomputes no more; see the table"
        said.append(f"{rest} other methods score no higher than {better}.")
    return said + _between_tuned(methods)


def _between_tuned(methods: Mapping[str, Any]) -> list[str]:
    """Sentences about pairs of methods with adapters; of many, those that differ."""
    tuned = [label for label, summary in methods.items() if summary["adapter"]]
    pairs = list(combinations(tuned, 2)) if len(tuned) <= MOST else []
    said = []
    within = "within chance at this number of questions"
    for other, label in pairs:
        minus = methods[label]["score_minus"][other]
        if is_shown(minus) or len(pairs) <= MOST_PAIRS:
            chance = "" if is_shown(minus) else f": {within}"
            points = with_interval("score", minus["mean"], minus["ci95"])
            said.append(f"{label} minus {other}: {points} points{chance}.")
    if unclear := len(pairs) - len(said):
        said.append(f"Of {len(pairs)} pairs of tuned methods, {unclear} differ {within}.")
    return said


def _gain(summary: Mapping[str, Any], label: str) -> str:
    closed, ci95 = summary["score_gap_recovered"], summary["score_gap_recovered_ci95"]
    if closed is None:
        return f"{label}: the gap is too uncertain to say what share of it is closed."
    share = with_interval("gap", closed, ci95) if closed >= 0 else "none"
    fresh, ratio = summary["recompute_ratio"], summary["ttft_over_full_prefill"]
    cost = f"recomputing {100 * fresh:.0f} % of the context" if fresh else "recomputing nothing"
    time = f", first token after {ratio:.2f} of full prefill's time" if ratio else ""
    return f"{label} closes {share} of that gap, {cost}{time}."


def is_shown(difference: Mapping[str, Any]) -> bool:
    """Whether a difference is significant after Holm's correction for all pairs of the run."""
    return difference["p_holm"] < ALPHA


def power_notes(results: Mapping[str, Any]) -> list[str]:
    """Sentences about differences from full prefill and naive reuse that need more questions."""
    notes = []
    for other in filter(None, (plain_label(results, name) for name in (ORACLE, FLOOR))):
        unclear = []
        for label, summary in results["methods"].items():
            minus, n = summary["score_minus"].get(other), summary["n"]
            if minus and not is_shown(minus) and (minus["n_needed"] or 0) > n:
                points = f"{label} ({written('score', minus['mean'])} points"
                unclear.append((minus["n_needed"], points))
        if unclear:
            named = sorted(unclear, key=itemgetter(0))[:MOST_NOTED]
            listed = "; ".join(f"{which}; {needed:,} would be enough)" for needed, which in named)
            if more := len(unclear) - len(named):
                listed += f"; and {more} more, which need more questions"
            notes.append(f"{n:,} questions cannot tell these methods from {other}: {listed}.")
    return notes
