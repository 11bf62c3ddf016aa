"""Runs a suite, then prints a table and sentences and draws a chart of the results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from blocktune.evaluation.compare import power_notes
from blocktune.evaluation.report.charts import MOST_GROUPS, draw_results, groups_of
from blocktune.evaluation.results import RESULTS
from blocktune.evaluation.runner import run_suite
from blocktune.evaluation.suite import Suite
from blocktune.tables import Table, with_half, written

NOTE = (
    "Scores in %, with half their 95 % interval (EM: exact match). Adj. F1: F1 over the questions "
    "that full prefill can answer, a filter that favours it; raw F1 is in the report. Recomp.: "
    "share of the context's tokens recomputed, over all layers. Of full: time to first token "
    "(TTFT) divided by full prefill's. Gap: share of the gap from naive reuse to full prefill that "
    "is closed; below 0: worse than naive reuse; -: the gap is within chance."
)
_COSTS = {
    "adj.\nF1": ("score", "adjusted_f1"),
    "re-\ncomp.": ("share", "recompute_ratio"),
    "TTFT\nms": ("ms", "ttft_s"),
    "of\nfull": ("ratio", "ttft_over_full_prefill"),
    "gap": ("gap", "score_gap_recovered"),
}


def run_and_show(
    suite: Suite, output: Path, title: str, command: list[str] | None = None
) -> dict[str, Any] | None:
    """Runs a suite, prints its table, draws its chart and returns the results; see `run_suite`."""
    if (results := run_suite(suite, output, command=command)) is None:
        return None
    count = max(summary["n"] for summary in results["methods"].values())
    caption = f"{Path(suite.model).name}, {count:,} questions; bars are 95 % intervals"
    picture = draw_results(results, output / "results.png", caption)
    console = Console()
    results_table(results, title).show(console)
    places = f"{output / RESULTS}  {picture}  {output / 'rows'}/"
    for note in (*power_notes(results), places):
        console.print(note, style="dim", markup=False, highlight=False)
    return results


def results_table(results: Mapping[str, Any], title: str = "") -> Table:
    """The results as a table: one row per method, with its scores by kind and its costs."""
    methods, groups = results["methods"], groups_of(results["methods"], MOST_GROUPS)
    tasks, scores, rows = results["tasks"], [], []
    for name in groups:
        broken = name if len(name) <= 10 else name.replace("/", "/\n").replace("-", "-\n", 1)
        # A group is a kind of the only task, a task, or ``TASK/KIND``.
        own = [n for n in tasks if len(tasks) == 1 or f"{name}/".startswith(f"{n}/")]
        scores.append(f"{broken}\n{tasks[max(own, key=len)]['title'] if own else 'score'}")
    for label, summary in methods.items():
        cells = [by_method[label] for by_method in groups.values()]
        shown = [with_half(cell["score"], cell["score_ci95"]) for cell in cells]
        costs = [written(form, summary[key]) for form, key in _COSTS.values()]
        rows.append((label, *shown, *costs))
    lengths = (summary["ttft_context_tokens"] for summary in methods.values())
    longest = max(filter(None, lengths), default=None)
    timed = longest and f" TTFT: median over contexts of {longest:,.0f} tokens, chunks cached."
    return Table(("method", *scores, *_COSTS), rows, title, NOTE + (timed or ""))
