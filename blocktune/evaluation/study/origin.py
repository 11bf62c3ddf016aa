"""Where results are from, in a sentence."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def origin(results: Mapping[str, Any]) -> str:
    """The command, commit, machine and number of questions behind a page's results."""
    about = results["provenance"]
    machine = about["hardware"]
    names = [*(machine.get("gpus") or ()), f"{machine['processor']}, {machine['cores']} cores"]
    made = f"Made by `{about['command']}` at commit `{_commit(about)}`"
    return f"{_asked(results)} {made} on {'; '.join(names)}."


def _asked(results: Mapping[str, Any]) -> str:
    if "traces" in results:
        cells = [cell for trace in results["traces"].values() for cell in trace["cells"]]
        asked, questions = max((cell["n"], cell["questions"]) for cell in cells)
        return f"{asked:,} requests of {questions:,} questions in each trace."
    count = max(summary["n"] for summary in results["methods"].values())
    return f"{count:,} questions, {len(results['methods'])} methods."


def _commit(about: Mapping[str, Any]) -> str:
    head, plus, changes = (about["commit"] or "unknown").partition("+")
    return head[:12] + plus + changes
