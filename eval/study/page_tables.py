"""Tables of results as Markdown, by what they show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blocktune.evaluation.compare import verdict
from blocktune.tables import Table, with_half, with_interval, written

Results = Mapping[str, Any]


def scores(results: Results, methods: Sequence[str] | None = None) -> str:
    """A row a method: score by kind with half its interval, cost, and what it wins back.

    Where no time was measured, it shows operations up to the first token.
    """
    shown = chosen(results, methods)
    timed = any(summary["ttft_over_full_prefill"] is not None for summary in shown.values())
    cost = "ttft_over_full_prefill" if timed else "flops_over_full_prefill"
    kinds = list(next(iter(shown.values()))["tasks"])
    kinds = kinds if len(kinds) > 1 else []
    headings = (
        "method",
        *kinds,
        "all",
        "recomputed",
        "TTFT, of full" if timed else "FLOPs, of full",
    )
    headings += ("gap recovered",)
    rows = []
    for label, summary in shown.items():
        cells = [_reach(summary["tasks"][kind]) for kind in kinds]
        spent = written("share", summary["recompute_ratio"]), written("ratio", summary.get(cost))
        rows.append((label, *cells, _reach(summary), *spent, _gap(summary)))
    return Table(headings, rows).markdown()


def f1(results: Results, methods: Sequence[str] | None = None) -> str:
    """The study's metric, with what its filter hides."""
    rows = []
    for label, summary in chosen(results, methods).items():
        names = ("f1", "adjusted_f1", "adjusted_f1_bias")
        cells = [written("score", summary[name]) for name in names]
        rows.append((label, *cells, written("count", summary["n_kept"])))
    return Table(("method", "F1", "adjusted F1", "filter hides", "kept"), rows).markdown()


def pairs(results: Results, pairs: Sequence[Sequence[str]]) -> str:
    """Differences in score: the first of each pair minus the second."""
    rows = []
    for label, other in pairs:
        summary = _known(results, label)
        _known(results, other)
        minus = summary["score_minus"][other]
        said = verdict(minus["mean"], minus["p_holm"], summary["n"], minus["n_needed"])
        points = with_interval("points", minus["mean"], minus["ci95"])
        p = written("p", minus["p_holm"])
        rows.append((f"{label} over {other}", points, p, written("count", summary["n"]), said))
    return Table(("pair", "points", "p (Holm)", "n", "verdict"), rows).markdown()


def choice(results: Results, method: str = "naive") -> str:
    """Layer by layer: where the tokens are that deviate most, and which layers choose them too."""
    own = _known(results, method)["fidelity"]["choice"]
    layers = range(1, len(own["beginnings"]))
    rows = [
        (
            str(layer),
            written("share", own["beginnings"][layer]),
            written("share", own["accrued"][layer]),
            written("share", own["overlap"][1][layer]),
            written("share", own["overlap"][-1][layer]),
        )
        for layer in layers
    ]
    headings = ("layer", "first 8 tokens of a chunk", "deviation in the top 15 %")
    headings += ("layer 1's choice, also here", "last layer's choice, also here")
    said = (
        f"By chance {written('share', own['first_share'])} would be first tokens; "
        f"{written('share', own['constant'])} of a layer's choice is every layer's."
    )
    return f"{Table(headings, rows).markdown()}\n\n{said}"


def chosen(results: Results, methods: Sequence[str] | None) -> dict[str, Any]:
    """Summaries of the methods that a table names, in its order; by default all."""
    return {label: _known(results, label) for label in methods or results["methods"]}


def _reach(summary: Mapping[str, Any]) -> str:
    return with_half(summary["score"], summary["score_ci95"], 1)


def _known(results: Results, label: str) -> Mapping[str, Any]:
    if label not in results["methods"]:
        known = ", ".join(results["methods"])
        raise ValueError(f"no method '{label}' in these results; they have: {known}")
    return results["methods"][label]


def _gap(summary: Mapping[str, Any]) -> str:
    if summary["score_gap_recovered"] is None:
        return ""
    return with_interval("gap", summary["score_gap_recovered"], summary["score_gap_recovered_ci95"])


def origin(results: Mapping[str, Any]) -> str:
    """The command, commit, machine and number of questions behind a page's results."""
    about = results["provenance"]
    machine = about["hardware"]
    names = [*(machine.get("gpus") or ()), f"{machine['processor']}, {machine['cores']} cores"]
    made = f"Made by `{about['command']}` at commit `{_commit(about)}`"
    return f"{_asked(results)} {made} on {'; '.join(names)}."


def _asked(results: Mapping[str, Any]) -> str:
    count = max(summary["n"] for summary in results["methods"].values())
    return f"{count:,} questions, {len(results['methods'])} methods."


def _commit(about: Mapping[str, Any]) -> str:
    head, plus, changes = (about["commit"] or "unknown").partition("+")
    return head[:12] + plus + changes
