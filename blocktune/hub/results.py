"""Results for the card: read, and held to be of the very adapter that is published."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from blocktune.adapter import OWN_WEIGHTS, AdapterInfo
from blocktune.hub.files import public
from blocktune.identity import adapter_fingerprint, same_base


class Measured(NamedTuple):
    """What a card shows of ``results.json``.

    Attributes:
        methods: Label -> scores, of the base and of the adapter; those of others are left out.
        left_out: Labels of methods that ran with other adapters.
        metric: The headline score's title, or None where the tasks differ in it.
        origin: Provenance, without this machine's folders.
    """

    methods: Mapping[str, Mapping[str, Any]]
    left_out: tuple[str, ...]
    metric: str | None
    origin: Mapping[str, Any]


def read_results(path: Path, folder: Path, info: AdapterInfo) -> Measured:
    """Reads what `blocktune eval` wrote.

    Args:
        path: Of ``results.json``.
        folder: Of the adapter.
        info: Its own.

    Raises:
        ValueError: If the file is not there, is none that `blocktune eval` wrote, or is not of
            this adapter on its base.
    """
    record = _read(path)
    made = record.get("provenance", {})
    if "base_fingerprint" not in made:
        raise ValueError(
            f"{path} does not say which weights it measured, since an older blocktune wrote it, "
            "so nothing ties it to this adapter; repeat its `blocktune eval`"
        )
    if not same_base(made["base_fingerprint"], info.base_fingerprint):
        raise ValueError(
            f"{path} is of another base ({made['base_fingerprint']}) than '{folder}' "
            f"({info.base_fingerprint}); evaluate this adapter"
        )
    known, own = made.get("adapter_fingerprints", {}), adapter_fingerprint(folder)
    others, methods = [], {}
    for label, one in record["methods"].items():
        # A mean over seeds is of several adapters; the others' score is not this one's.
        alone = known.get(one["adapter"]) == own and len(one.get("seeds", ())) < 2
        if one["adapter"] is None or alone:
            methods[label] = one
        else:
            others.append(label)
    whole = info.base_model == OWN_WEIGHTS  # then the "base" of the run is this very model
    if not (methods if whole else any(one["adapter"] for one in methods.values())):
        raise ValueError(
            f"{path} measures no method with the adapter '{folder}' alone, but "
            f"{', '.join(others) or 'the base'}; evaluate this adapter"
        )
    titles = {task.get("title") for task in record.get("tasks", {}).values()}
    return Measured(
        methods, tuple(others), titles.pop() if len(titles) == 1 else None, public(made)
    )


def _read(path: Path) -> Mapping[str, Any]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"no results at '{path}'; make them with `blocktune eval`") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error})") from None
    methods = record.get("methods") if isinstance(record, dict) else None
    wanted = {"n", "em", "ci95", "adapter"}
    if not isinstance(methods, dict) or not all(wanted <= own.keys() for own in methods.values()):
        raise ValueError(
            f"{path}: not a results.json of `blocktune eval`; it needs 'methods', each with "
            "n, em, ci95 and adapter"
        )
    return record
