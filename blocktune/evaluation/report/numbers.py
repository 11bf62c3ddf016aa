"""Numbers of a report: each knows the place in `results.json` that it was read from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

ABSENT = "-"
FORMS: dict[str, Callable[[float], str]] = {
    "score": lambda value: f"{100 * value:.1f}",
    "points": lambda value: f"{100 * value:+.1f}",
    "share": lambda value: f"{100 * value:.0f} %",
    "ms": lambda value: f"{1000 * value:.1f}",
    "ratio": lambda value: f"{value:.2f}x",
    "p": lambda value: f"{value:.2g}",
    "count": lambda value: f"{value:,.0f}",
    "nats": lambda value: f"{value:.3g}",
}
"""How a number is written, by the kind of number it is."""


class Shown(NamedTuple):
    """A piece of a table's cell: a number with its origin, or plain text.

    Attributes:
        text: As it is read.
        path: JSON pointer (RFC 6901) into ``results.json``; empty for plain text.
        value: The number itself, every digit.
        form: Its key in `FORMS`.
    """

    text: str
    path: str = ""
    value: str = ""
    form: str = ""


def number(results: Mapping[str, Any], form: str, *keys: str | int) -> Shown:
    """The number that lies under ``keys``; a dash where it is null.

    Args:
        results: What ``results.json`` holds.
        form: How it is written, of `FORMS`.
        keys: Names and indices on the way to it.
    """
    value: Any = results
    for key in keys:
        value = value[key]
    if value is None:
        return Shown(ABSENT)
    return Shown(FORMS[form](value), pointer(*keys), repr(value), form)


def interval(results: Mapping[str, Any], form: str, *keys: str | int) -> tuple[Shown, ...]:
    """The two numbers of an interval under ``keys``, in brackets."""
    low, high = (number(results, form, *keys, end) for end in (0, 1))
    return (Shown(" ("), low, Shown(" to "), high, Shown(")"))


def pointer(*keys: str | int) -> str:
    """The JSON pointer of a place."""
    return "".join(f"/{str(key).replace('~', '~0').replace('/', '~1')}" for key in keys)


def look_up(results: Any, path: str) -> Any:
    """What lies under a JSON pointer."""
    for part in path.removeprefix("/").split("/"):
        key = part.replace("~1", "/").replace("~0", "~")
        results = results[int(key)] if isinstance(results, list) else results[key]
    return results
