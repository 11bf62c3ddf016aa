"""Random words, numbers and codes, with RULER's word lists (the library wonderwords)."""

from __future__ import annotations

import functools
import string
import uuid
from random import Random


@functools.cache
def words_of(part: str) -> tuple[str, ...]:
    """All words of a part of speech, sorted: ``noun``, ``adjective`` or ``verb``."""
    from wonderwords import RandomWord

    return tuple(RandomWord().filter(include_categories=[part]))


def draw_name(rng: Random) -> str:
    """An adjective and a noun: ``amber-anchor``."""
    return f"{rng.choice(words_of('adjective'))}-{rng.choice(words_of('noun'))}"


def draw_number(rng: Random, digits: int = 7) -> str:
    """A number of so many digits."""
    return str(rng.randint(10 ** (digits - 1), 10**digits - 1))


def draw_uuid(rng: Random) -> str:
    """A random UUID, version 4."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def draw_letters(rng: Random, length: int, alphabet: str = string.ascii_uppercase) -> str:
    """So many letters."""
    return "".join(rng.choices(alphabet, k=length))


def draw_distinct(draw, count: int, taken: set[str] | None = None) -> list[str]:
    """Calls ``draw`` until ``count`` different values came, none of them in ``taken``."""
    found: dict[str, None] = {}
    while len(found) < count:
        value = draw()
        if value not in (taken or ()):
            found[value] = None
    return list(found)
