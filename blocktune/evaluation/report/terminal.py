"""Runs a suite, then prints a table and sentences and draws a chart of the results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from blocktune.evaluation.compare import power_notes
from blocktune.evaluation.report.charts import draw_results
from blocktune.evaluation.results import RESULTS
from blocktune.evaluation.runner import run_suite
from blocktune.evaluation.suite import Suite
from blocktune.tables import Table, with_half, written

NOTE = (
    "Scores in %, with half their 95 % interval (EM: exact match). Adj. F1: F1 over the questions "
    "that full prefill can answer, a filter that favours it; raw F1 is in the report. Recomp.: "
    "share of the context's tokens recomputed, over all layers. Of full: time to first token "
    "(TTFT) divided by full prefill's. Gap: share of the gap from naive reuse to full prefill that "
    "is closed; below 0: worse than naive reuse."
)
MOST_GROUPS = 6
"""Largest number of score columns; with more tasks or kinds, only the mean over all is shown."""


def run_and_show(
    suite: Suite,
    output: Path,
    title: str,
    command: list[str] | None = None,
) -> dict[str, Any] | None:
    """Runs a suite, prints its table and draws its chart; for other arguments see `run_suite`.

    Returns the results, or None except in the main process.
    """
    results = run_suite(suite, output, command=command)
    if results is None:
        return None
    count = max(summary["n"] for summary in results["methods"].values())
    caption = f"{Path(suite.model).name}, {count:,} questions; bars are 95 % intervals"
    picture = draw_results(results, output / "results.png", caption)
    console = Console()
    results_table(results, title).show(console)
    for note in power_notes(results):
        console.print(note, style="dim", markup=False, highlight=False)
    places = f"{output / RESULTS}  {picture}  {output / 'rows'}/"
    console.print(places, style="dim", markup=False)
    return results


def results_table(results: Mapping[str, Any], title: str = "") -> Table:
    """The results as a table: one row per method, with its scores by kind and its costs."""
    methods, tasks = results["methods"], results["tasks"]
    kinds = list(next(iter(methods.values()))["tasks"])
    kinds = kinds if len(kinds) <= MOST_GROUPS else []
    named = {
        kind: kind.partition("/")[0] if len(tasks) > 1 else next(iter(tasks)) for kind in kinds
    }
    scores = [f"{_broken(kind)}\n{tasks[named[kind]]['title']}" for kind in kinds] or ["all\nscore"]
    rows = []
    for label, summary in methods.items():
        cells = [summary["tasks"][kind] for kind in kinds] or [summary]
        shown = [with_half(cell["score"], cell["score_ci95"]) for cell in cells]
        rows.append(
            (label, *shown, *(written(form, summary[key]) for form, key in _COSTS.values()))
        )
    lengths = (summary["ttft_context_tokens"] for summary in methods.values())
    longest = max(filter(None, lengths), default=None)
    timed = longest and f" TTFT: median over contexts of {longest:,.0f} tokens, chunks cached."
    return Table(("method", *scores, *_COSTS), rows, title, NOTE + (timed or ""))


_COSTS = {
    "adj.\nF1": ("score", "adjusted_f1"),
    "re-\ncomp.": ("share", "recompute_ratio"),
    "TTFT\nms": ("ms", "ttft_s"),
    "of\nfull": ("ratio", "ttft_over_full_prefill"),
    "gap": ("gap", "score_gap_recovered"),
}


def _broken(kind: str) -> str:
    """The name of a kind, broken into two lines if it is long."""
    return kind if len(kind) <= 10 else kind.replace("/", "/\n").replace("-", "-\n", 1)
