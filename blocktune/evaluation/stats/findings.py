"""Results in sentences: gaps with their intervals, and what is within chance."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from blocktune.evaluation.stats.results import FLOOR, ORACLE, plain_label
from blocktune.evaluation.stats.significance import ALPHA
from blocktune.tables import with_interval, written

MOST = 8  # methods that are worth a sentence each; more are worth a table


def findings(results: Mapping[str, Any]) -> list[str]:
    """Sentences about results: what naive reuse loses, what each other method wins back.

    A difference counts as real if Holm's p over all pairs of the run is below `ALPHA`, as in the
    tables' verdicts and in `power_notes`. Methods with an adapter are also compared with one
    another. Of more than `MOST` methods only those are named that nothing beats at less
    recomputation. Without both baselines there is nothing to say.
    """
    methods = results["methods"]
    baselines = (plain_label(results, ORACLE), plain_label(results, FLOOR))
    if None in baselines:
        return []
    full, naive = baselines
    tuned = [label for label, summary in methods.items() if summary["adapter"]]
    others = [n for n in methods if n not in baselines and methods[n]["method"] != "no-context"]
    lost = methods[full]["score_minus"][naive]
    loss = _loss(methods, full, naive, _named(results))
    if not (is_shown(lost) and lost["mean"] > 0):
        return [loss, *_between(methods, tuned)]
    if len(others) <= MOST:
        return [loss, *(_gain(methods, label) for label in others), *_between(methods, tuned)]
    front = [n for n in results["budget"]["pareto"]["recompute_ratio"] if n in others]
    rest = (
        f"{len(others) - len(front)} other methods score no higher than one of these, or than a "
        "baseline, that recomputes no more; the table holds them."
    )
    return [loss, *(_gain(methods, label) for label in front), rest]


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
                f"{n}: {written('score', mean)}, needs {needed:,}" for n, mean, needed in unclear
            )
            count = next(iter(results["methods"].values()))["n"]
            notes.append(f"{count:,} questions are too few to tell from {other}: {named}.")
    return notes


def _named(results: Mapping[str, Any]) -> str:
    """The headline metric, where all tasks share one."""
    titles = {task["title"] for task in results["tasks"].values()}
    if len(titles) > 1:
        return "score"
    return "exact match" if titles == {"EM"} else next(iter(titles))


def _loss(methods: Mapping[str, Any], full: str, naive: str, named: str) -> str:
    by_kind = ", ".join(
        f"{written('score', methods[full]['tasks'][kind]['score'] - cell['score'])} on {kind}"
        for kind, cell in methods[naive]["tasks"].items()
    )
    loss = methods[full]["score_minus"][naive]
    points = f"{with_interval('score', loss['mean'], loss['ci95'])} points of {named}"
    if is_shown(loss):
        return f"Naive reuse loses {points} ({by_kind})."
    p = f"p = {loss['p_holm']:.2g}, corrected for all pairs"
    return f"Full prefill minus naive reuse: {points}, within chance ({p})."


def _gain(methods: Mapping[str, Any], label: str) -> str:
    summary = methods[label]
    if summary["score_gap_recovered"] is None:
        return f"{label}: the gap is too uncertain for a share of it."
    low, high = summary["score_gap_recovered_ci95"]
    fresh = summary["recompute_ratio"]
    cost = f"recomputing {100 * fresh:.0f} % of the context" if fresh else "recomputing nothing"
    ratio = summary["ttft_over_full_prefill"]
    time = f", first token after {ratio:.2f} of full prefill's time" if ratio else ""
    share = f"{100 * summary['score_gap_recovered']:.0f} % ({100 * low:.0f} to {100 * high:.0f})"
    return f"{label} closes {share} of that gap, {cost}{time}."


def _between(methods: Mapping[str, Any], tuned: list[str]) -> Iterator[str]:
    for index, other in enumerate(tuned):
        for label in tuned[index + 1 :]:
            found = methods[label]["score_minus"][other]
            verdict = "" if is_shown(found) else ": within chance at this number of questions"
            points = with_interval("score", found["mean"], found["ci95"])
            yield f"{label} minus {other}: {points} points{verdict}."
