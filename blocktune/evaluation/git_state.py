"""Which code made a row: a digest of the source that answers and scores."""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path

import blocktune

PARTS = (
    "layout.py",
    "links.py",
    "registry.py",
    "positions",
    "attention",
    "prompt",
    "select",
    "reshape",
    "cache",
    "reuse",
    "engine",
    "evaluation/metrics",
    "evaluation/rows.py",
)
"""What decides an output or its score; commands, training and reports do not."""


@cache
def code_digest() -> str:
    """Version and digest of the code that decides rows, such as ``0.1.0-3f2a91c05d7e``.

    A commit would be too coarse (a changed README is a new commit) and too fine (uncommitted work
    has none): rows of other code are dropped, and only those.
    """
    root = Path(blocktune.__file__).parent
    digest = hashlib.sha256()
    for part in PARTS:
        for path in sorted(_sources(root / part)):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{blocktune.__version__}-{digest.hexdigest()[:12]}"


def _sources(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    return list(path.rglob("*.py"))
