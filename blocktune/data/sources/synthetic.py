"""Synthetic worlds named in one string: ``worlds:test?seed=1&n=500&kinds=2-hop``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from blocktune.data.example import RagExample

_KEYS = {
    "seed": "a whole number",
    "n": "the number of questions",
    "kinds": "names with commas between",
    "passages": "a number of chunks or LOW-HIGH",
    "questions_per_world": "a whole number",
    "aliased": "a share from 0 to 1",
    "crowded": "1 or 0: whether any number of documents go on in other chunks",
    "turns": "the number of questions asked in turn of one context",
}


def read_worlds(split: str, options: Mapping[str, str]) -> Iterator[RagExample]:
    """Generates the examples of a ``worlds:`` source.

    Args:
        split: ``train``, ``dev`` or ``test``.
        options: Of the query string; see the error for the keys.

    Raises:
        ValueError: If a key is unknown or a value is not accepted.
    """
    from blocktune.data.worlds import WorldConfig, generate_examples

    if unknown := options.keys() - _KEYS.keys():
        known = ", ".join(f"{key} ({what})" for key, what in _KEYS.items())
        raise ValueError(f"unknown option '{min(unknown)}' of 'worlds:{split}'; known: {known}")
    values = {}
    if "seed" in options:
        values["seed"] = _number(options, "seed")
    if "n" in options:
        values["num_examples"] = _number(options, "n")
    if "questions_per_world" in options:
        values["questions_per_world"] = _number(options, "questions_per_world")
    if "turns" in options:
        values["turns"] = _number(options, "turns")
    if "aliased" in options:
        values["aliased"] = _number(options, "aliased", float)
    if "crowded" in options:
        values["crowded"] = bool(_number(options, "crowded"))
    if "kinds" in options:
        values["kinds"] = dict.fromkeys(options["kinds"].split(","), 1.0)
    if "passages" in options:
        values["num_passages"] = _range(options["passages"])
    return generate_examples(WorldConfig(split=split, **values))


def _number(options: Mapping[str, str], key: str, number: type = int) -> int | float:
    try:
        return number(options[key])
    except ValueError:
        raise ValueError(f"worlds: '{key}' must be {_KEYS[key]}, got '{options[key]}'") from None


def _range(text: str) -> int | tuple[int, int]:
    low, dash, high = text.partition("-")
    try:
        return (int(low), int(high)) if dash else int(low)
    except ValueError:
        raise ValueError(f"worlds: 'passages' must be {_KEYS['passages']}, got '{text}'") from None
