"""Data sets by their Hugging Face name, or a local folder of the same files."""

from __future__ import annotations

from collections.abc import Iterator

from blocktune.data.sources.files import Record

SHORT_NAMES = {
    "musique": "dgslibisey/MuSiQue",
    "2wikimultihopqa": "framolfese/2WikiMultihopQA",
    "hotpotqa": "hotpotqa/hotpot_qa:distractor",
}


def read_hub(name: str, split: str = "validation") -> Iterator[Record]:
    """Reads a data set with ``datasets``.

    Args:
        name: ``owner/name``, a folder, either with ``:config``.
        split: As the data set names it.

    Raises:
        ValueError: If ``datasets`` is not installed or cannot load it; says why in one line.
    """
    try:
        from datasets import load_dataset
    except ImportError:
        raise ValueError(
            f"'hf:{name}' needs the datasets package: pip install 'blocktune[eval]'"
        ) from None
    path, _, config = name.partition(":")
    try:
        rows = load_dataset(path, config or None, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot load 'hf:{name}' (split '{split}'): {reason}") from None
    for number, row in enumerate(rows, start=1):
        yield Record(f"{name} ({split}), record {number}", row)
