"""Data sets by their Hugging Face name, or a local folder of the same files."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random
from typing import Any

from blocktune.data.sources.catalog import DataSet
from blocktune.data.sources.files import Record


def read_hub(
    source: DataSet,
    split: str | None = None,
    limit: int | None = None,
    shuffle: int | None = None,
) -> Iterator[Record]:
    """Reads a data set with ``datasets``.

    Args:
        source: Repository or folder, configuration, revision.
        split: As the data set names it; None takes ``source.split``.
        limit: How many examples are wanted; only large sets must know.
        shuffle: Seed of another order than the set's. Of a large set, which comes as a stream, rows
            change places within some thousands.

    Raises:
        ValueError: If ``datasets`` is not installed, cannot load it, or a large set is asked for
            without a limit; says why in one line.
    """
    split = split or source.split
    name = source.hub + (f":{source.config}" if source.config else "")
    if source.streamed and limit is None:
        raise ValueError(f"'{name}' is too large to load as a whole; give a limit")
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"'hf:{name}' needs the datasets package: pip install 'blocktune[data]'"
        ) from None
    try:
        rows = load_dataset(
            source.hub,
            source.config,
            split=split,
            revision=source.revision,
            streaming=source.streamed,
        )
        for number, row in _ordered(rows, source.streamed, shuffle):
            yield Record(f"{name} ({split}), record {number}", row)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load 'hf:{name}' (split '{split}'): {reason}") from None


def _ordered(rows: Any, streamed: bool, seed: int | None) -> Iterator[tuple[int, Any]]:
    """Rows with their numbers, which are those of the set but in a stream that is shuffled."""
    if seed is None or streamed:
        yield from enumerate(rows if seed is None else rows.shuffle(seed=seed), start=1)
        return
    for index in Random(seed).sample(range(len(rows)), len(rows)):
        yield index + 1, rows[index]
