"""Digests of the code and the weights that made a row, so that others are never mixed in."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import blocktune
from blocktune.adapter import find_release
from blocktune.models.identity import adapter_fingerprint, base_fingerprint
from blocktune.models.load import adapter_folder

PARTS = ("layout.py", "links.py", "registry.py", "models", "positions", "attention", "prompt")
PARTS += ("cache", "methods", "engine", "evaluation/metrics.py", "evaluation/rows.py")
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
    return [path] if path.is_file() else list(path.rglob("*.py"))


def fingerprints(engines: Mapping[str | None, Any]) -> dict[str, Any]:
    """Digests of the base and of the adapters, for the provenance.

    Args:
        engines: Adapter (None is the base) -> the engine that was loaded with it.

    Returns:
        ``base_fingerprint``, see `blocktune.models.identity`, and ``adapter_fingerprints`` by the
        adapter's name as the suite gives it; published releases of other projects have none.
    """
    first = next(iter(engines.values()))
    if None in engines:
        base = base_fingerprint(engines[None].model)
    else:  # adapters are merged into the model; each was held to the base
        base = first.adapter.base_fingerprint
    adapters = [name for name in engines if name is not None and find_release(name) is None]
    return {
        "base_fingerprint": base,
        "adapter_fingerprints": {n: adapter_fingerprint(adapter_folder(n)) for n in adapters},
    }
