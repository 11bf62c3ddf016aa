"""The card's table of results, from the file that `blocktune eval` wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from blocktune.hub.files import public

HEADINGS = ("method", "n", "EM (95 %)", "F1", "adjusted F1", "recomputed", "TTFT / full prefill")
NOTE = (
    "Scores in %. Adjusted F1: over the questions that full prefill of the base can answer. "
    "Recomputed: share of context tokens made afresh. TTFT: time to first token, chunks cached."
)


def results_section(path: Path | None) -> str:
    """The section of a card; without a file it says that nothing was measured.

    Raises:
        ValueError: If the file is not there, or is none that `blocktune eval` wrote.
    """
    if path is None:
        return "## Results\n\nNot evaluated."
    results = _read(path)
    lines = ["| " + " | ".join(HEADINGS) + " |", "|---|" + "---:|" * (len(HEADINGS) - 1)]
    lines += ["| " + " | ".join(_row(name, own)) + " |" for name, own in results.items()]
    return "\n\n".join(["## Results", "\n".join(lines), NOTE + _origin(path)])


def _read(path: Path) -> Mapping[str, Mapping[str, Any]]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"no results at '{path}'; make them with `blocktune eval`") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    methods = record.get("methods") if isinstance(record, dict) else None
    wanted = {"n", "em", "ci95"}
    if not isinstance(methods, dict) or not all(wanted <= own.keys() for own in methods.values()):
        raise ValueError(
            f"{path}: not a results.json of `blocktune eval`; it needs 'methods', each with "
            "n, em and ci95"
        )
    return methods


def _row(name: str, own: Mapping[str, Any]) -> tuple[str, ...]:
    low, high = own["ci95"]
    interval = f"{_percent(own['em'])} ({_percent(low)} to {_percent(high)})"
    scores = (_percent(own.get(key)) for key in ("f1", "adjusted_f1", "recompute_ratio"))
    ratio = own.get("ttft_over_full_prefill")
    return (name, f"{own['n']:,}", interval, *scores, "" if ratio is None else f"{ratio:.2f}")


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.1f}"


def _origin(path: Path) -> str:
    made = public(json.loads(path.read_text(encoding="utf-8")).get("provenance", {}))
    parts = [f"by `{made['command']}`"] if made.get("command") else []
    parts += [f"at commit `{made['commit'][:12]}`"] if made.get("commit") else []
    return f" Made {', '.join(parts)}." if parts else ""
