"""The results as one table that fits a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

NOTE = (
    "EM: exact match in %, with half its 95 % interval. Adj. F1: over the questions that full "
    "prefill can answer. Fresh: context tokens recomputed. Gap: share of the way from naive "
    "reuse to full prefill, all kinds together."
)
ABSENT = "-"


def results_table(results: Mapping[str, Any], title: str | None = None) -> Table:
    """Lays out `build_results`: a row per method, exact match by kind, then what it costs.

    Args:
        results: What ``results.json`` holds.
        title: Above the table.
    """
    methods = results["methods"]
    kinds = list(next(iter(methods.values()))["tasks"])
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
        table.add_column(f"{_broken(kind)}\nEM", justify="right", vertical="bottom")
    for heading in ("adj.\nF1", "fresh", "TTFT\nms", "of full\nprefill", "gap\nrecovered"):
        table.add_column(heading, justify="right")
    for label, summary in methods.items():
        table.add_row(label, *(_score(summary["tasks"][kind]) for kind in kinds), *_costs(summary))
    return table


def _timed(methods: Mapping[str, Any]) -> str:
    lengths = (summary["ttft_context_tokens"] for summary in methods.values())
    longest = max(filter(None, lengths), default=None)
    if longest is None:
        return ""
    return (
        f" TTFT: median time to first token over contexts of {longest:,.0f} tokens, chunks cached."
    )


def _score(summary: Mapping[str, Any]) -> Text:
    low, high = summary["ci95"]
    return Text.assemble(f"{_hundred(summary['em'])} ", (f"±{50 * (high - low):.0f}", "dim"))


def _costs(summary: Mapping[str, Any]) -> list[str]:
    seconds, ratio = summary["ttft_s"], summary["ttft_over_full_prefill"]
    return [
        _hundred(summary["adjusted_f1"]),
        f"{summary['recompute_ratio']:.0%}",
        ABSENT if seconds is None else f"{1000 * seconds:.1f}",
        ABSENT if ratio is None else f"{ratio:.2f}x",
        _percent(summary.get("gap_recovered")),
    ]


def _hundred(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.1f}"


def _percent(share: float | None) -> str:
    return ABSENT if share is None else f"{100 * share:.0f} %"


def _broken(kind: str) -> str:
    """A kind's name over two lines where it is long."""
    return kind if len(kind) <= 10 else kind.replace("/", "/\n").replace("-", "-\n", 1)
