"""Results as they are committed: what tables need, small, and without a machine's paths."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from pathlib import Path, PurePath
from typing import Any

from blocktune.files import replace_text

SOURCES = ("results.json", "traces.json")
DROPPED = ("em_minus", "sweeps", "budget")
"""Large, and read by no table; differences of the headline score stay, but not by kind."""


def keep(run: Path, path: Path) -> bool:
    """Writes what is kept of a run's results; returns whether the run has any.

    Args:
        run: The --output folder of a run.
        path: The JSON file to write.
    """
    for source in SOURCES:
        if (run / source).is_file():
            results = json.loads((run / source).read_text(encoding="utf-8"))
            replace_text(path, _lines(kept(results)) + "\n")
            return True
    return False


def kept(results: Mapping[str, Any]) -> dict[str, Any]:
    """The part of ``results.json`` or ``traces.json`` that is committed."""
    found = json.loads(json.dumps({k: v for k, v in results.items() if k not in DROPPED}))
    for summary in found.get("methods", {}).values():
        summary.pop("em_minus", None)
        for cell in summary["tasks"].values():
            for name in ("em_minus", "score_minus"):
                cell.pop(name, None)
    command = found["provenance"].get("command")
    if command:
        found["provenance"]["command"] = shlex.join(map(_no_path, shlex.split(command)))
    return found


def _lines(value: Any, depth: int = 2) -> str:
    """JSON with a line for every method: small, and yet a diff shows which have changed."""
    if depth == 0 or not isinstance(value, dict) or not value:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    inner = (f"{json.dumps(key)}: {_lines(one, depth - 1)}" for key, one in value.items())
    return "{\n" + ",\n".join(inner) + "\n}"


def _no_path(word: str) -> str:
    """The last part of an absolute path: the others are of one machine."""
    return PurePath(word).name if PurePath(word).is_absolute() else word
