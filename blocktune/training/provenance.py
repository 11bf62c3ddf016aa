"""Where a result came from: commit, versions, command."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "datasets", "deepspeed")


def commit() -> str:
    """The checkout's commit, ``-dirty`` if it was changed, else the installed version."""
    folder = Path(__file__).resolve().parent
    try:
        # A package installed inside someone else's checkout is not that checkout's commit.
        _git(folder, "ls-files", "--error-unmatch", Path(__file__).name)
        head = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", "--", "..")
    except (OSError, subprocess.CalledProcessError):
        return f"blocktune {version('blocktune')}"
    return f"{head}-dirty" if changed else head


def provenance() -> dict[str, Any]:
    """Commit, command and package versions of this process."""
    versions = {"python": sys.version.split()[0]}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {"commit": commit(), "command": command, "versions": versions}


def _git(folder: Path, *command: str) -> str:
    done = subprocess.run(
        ["git", *command], cwd=folder, check=True, capture_output=True, text=True, timeout=10
    )
    return done.stdout.strip()
