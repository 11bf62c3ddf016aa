"""The table of traces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from blocktune.evaluation.report.numbers import ABSENT, FORMS

HEADINGS = (
    "trace", "method", "score", "over naive", "over full prefill", "stored, MiB", "recomputed",
    "TTFT, ms",
)  # fmt: skip


def traces(results: Mapping[str, Any], methods: Sequence[str] | None = None) -> str:
    """A row a method and trace: score, gain over naive reuse and full prefill, storage and time."""
    lines = [f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
    for name, trace in results["traces"].items():
        for cell in trace["cells"]:
            if methods is None or cell["method"] in methods:
                lines.append(f"| {name} | {' | '.join(_cells(cell))} |")
    return "\n".join(lines)


def _cells(cell: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = cell["ci95"]
    limit = f" of {cell['store_mib']}" if cell["store_mib"] else ""
    return (
        cell["method"],
        f"{FORMS['score'](cell['score'])} ±{50 * (high - low):.1f}",
        _gain(cell["minus"].get("naive")),
        _gain(cell["minus"].get("full-prefill")),
        f"{cell['stored_bytes'] / (1 << 20):.1f}{limit}",
        FORMS["share"](cell["recompute_ratio"]),
        FORMS["ms"](cell["ttft_s"]),
    )


def _gain(minus: Mapping[str, Any] | None) -> str:
    if minus is None:
        return ABSENT
    low, high = (FORMS["points"](end) for end in minus["ci95"])
    return f"{FORMS['points'](minus['mean'])} ({low} to {high})"
