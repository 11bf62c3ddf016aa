"""The card's table of results, from the file that `blocktune eval` wrote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blocktune.hub.results import Measured

NOTE = (
    "Scores in %, with 95 % intervals in brackets. Adjusted F1: over the questions that full "
    "prefill of the base can answer. Recomputed: share of context tokens made afresh. TTFT: time "
    "to first token, chunks cached."
)
SHOWN = ("EM", "F1")
"""Titles of headline scores that have a column in any case."""


def results_section(measured: Measured | None) -> str:
    """The section of a card; without results it says that nothing was measured."""
    if measured is None:
        return "## Results\n\nNot evaluated."
    title = None if measured.metric in SHOWN else (measured.metric or "score of the task")
    if not all("score" in own for own in measured.methods.values()):
        title = None
    headings = ["method", "n", *([title] if title else []), "EM", "F1", "adjusted F1"]
    headings += ["recomputed", "TTFT / full prefill"]
    lines = [_line(headings), "|---|" + "---:|" * (len(headings) - 1)]
    lines += [_line(_row(name, own, bool(title))) for name, own in measured.methods.items()]
    return "\n\n".join(["## Results", "\n".join(lines), NOTE + _origin(measured)])


def _row(name: str, own: Mapping[str, Any], headline: bool) -> list[str]:
    scores = [_score(own, "score", "score_ci95")] if headline else []
    scores += [_score(own, "em", "ci95"), _score(own, "f1", "f1_ci95")]
    scores += [_percent(own.get(key)) for key in ("adjusted_f1", "recompute_ratio")]
    ratio = own.get("ttft_over_full_prefill")
    return [name, f"{own['n']:,}", *scores, "" if ratio is None else f"{ratio:.2f}"]


def _score(own: Mapping[str, Any], name: str, interval: str) -> str:
    if own.get(interval) is None:
        return _percent(own.get(name))
    low, high = own[interval]
    return f"{_percent(own[name])} ({_percent(low)} to {_percent(high)})"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _origin(measured: Measured) -> str:
    made = measured.origin
    parts = [f"by `{made['command']}`"] if made.get("command") else []
    parts += [f"at commit `{made['commit'][:12]}`"] if made.get("commit") else []
    told = f" Made {', '.join(parts)}." if parts else ""
    others = ", ".join(measured.left_out)
    return told + (f" Left out, as they are of other adapters: {others}." if others else "")
