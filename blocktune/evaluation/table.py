"""The results as one table that fits a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

NOTE = (
    "Scores in %, with half their 95 % interval (EM: exact match). Adj. F1: over the questions "
    "that full prefill can answer, a filter that favours it; raw F1 is in the report. Fresh: "
    "context tokens recomputed. Gap: share of the way from naive reuse to full prefill, all "
    "together."
)
MOST_GROUPS = 6
"""Tasks and kinds that fit beside each other; of more, only the mean over all is shown."""
ABSENT = "-"


def results_table(results: Mapping[str, Any], title: str | None = None) -> Table:
    """Lays out `build_results`: a row per method, exact match by kind, then what it costs.

    Args:
        results: What ``results.json`` holds.
        title: Above the table.
    """
    methods = results["methods"]
    kinds = list(next(iter(methods.values()))["tasks"])
    kinds = kinds if len(kinds) <= MOST_GROUPS else []
    table = Table(
        title=title,
        caption=NOTE + _timed(methods),
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
    )
    table.add_column("method", no_wrap=True)
    for kind in kinds:
        heading = f"{_broken(kind)}\n{title_of(results, kind)}"
        table.add_column(heading, justify="right", vertical="bottom")
    if not kinds:
        table.add_column("all\nscore", justify="right", vertical="bottom")
    for heading in ("adj.\nF1", "fresh", "TTFT\nms", "of full\nprefill", "gap\nrecovered"):
        table.add_column(heading, justify="right")
    for label, summary in methods.items():
        cells = [summary["tasks"][kind] for kind in kinds] or [summary]
        table.add_row(label, *map(_score, cells), *_costs(summary))
    return table


def title_of(results: Mapping[str, Any], group: str) -> str:
    """What the headline metric of a task, or of one of its kinds, is called."""
    tasks = results["tasks"]
    named = group.partition("/")[0] if len(tasks) > 1 else next(iter(tasks))
    return tasks[named]["title"]


def _timed(methods: Mapping[str, Any]) -> str:
    lengths = (summary["ttft_context_tokens"] for summary in methods.values())
    longest = max(filter(None, lengths), default=None)
    if longest is None:
        return ""
    return (
        f" TTFT: median time to first token over contexts of {longest:,.0f} tokens, chunks cached."
    )


def _score(summary: Mapping[str, Any]) -> Text:
    low, high = summary["score_ci95"]
    return Text.assemble(f"{_hundred(summary['score'])} ", (f"±{50 * (high - low):.0f}", "dim"))


def _costs(summary: Mapping[str, Any]) -> list[str]:
    seconds, ratio = summary["ttft_s"], summary["ttft_over_full_prefill"]
    return [
        _hundred(summary["adjusted_f1"]),
        f"{summary['recompute_ratio']:.0%}",
        ABSENT if seconds is None else f"{1000 * seconds:.1f}",
        ABSENT if ratio is None else f"{ratio:.2f}x",
        _percent(summary.get("score_gap_recovered")),
    ]


def _hundred(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f}"


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.0f} %"


def _broken(kind: str) -> str:
    """A kind's name over two lines where it is long."""
    return kind if len(kind) <= 10 else kind.replace("/", "/\n").replace("-", "-\n", 1)
