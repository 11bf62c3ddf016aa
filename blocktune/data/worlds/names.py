"""Names for the synthetic worlds: few words, many names, splits that never share one.

A tiny model can learn a few hundred words but not tens of thousands of names, so names are
composed: each word becomes one token, and a held-out name is a new combination of known words.
"""

from __future__ import annotations

import zlib
from functools import cache
from itertools import product
from random import Random

SPLITS = ("train", "dev", "test")


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


FEMALE = _words("""
    Anna Clara Dora Edith Fiona Greta Helen Iris Julia Karen Laura Maria
""")
MALE = _words("""
    Adam Boris Carl David Evan Frank George Henry Ivan Jack Kevin Leo
""")
LAST = _words("""
    Abbot Baker Carter Dalton Ellis Fisher Garner Harper Jensen Keller Lang Mason Norris Olsen
    Parker Quill Reed Sawyer Tanner Vance Walsh Webb Yates York
""")
NICKNAME = _words("""
    Ace Badger Bear Duke Falcon Fox Ghost Hawk Lucky Moose Otter Panda Raven Rocket Tiger Wren
""")

PLACE = _words("""
    Port Lake New Old Fort Mount East West North South
""")
ROOT = _words("""
    Alder Barrow Calder Denver Elgin Fenwick Garth Hollow Jarrow Kirby Linden Melrose Newbury
    Orford Penrith Ross Selby Tarn Whitby Yarrow
""")

MOOD = _words("""
    Silent Broken Golden Hidden Crimson Frozen Bitter Burning Distant Empty Gentle Iron Lonely
    Pale Quiet Secret
""")
THING = _words("""
    Harbor Garden Mirror Island Forest Bridge Castle Desert Engine Lantern Market Mountain Palace
    Piano Road Signal Station Tower Train Valley
""")

WORK = _words("""
    Letters Songs Tales Maps Clocks Birds Bells Doors Rivers Stars Walls Winds Ships Roots
""")
MATTER = _words("""
    Salt Ash Glass Silver Smoke Dust Amber Clay Copper Snow Rain Sand Paper Steel
""")

FIRM = _words("""
    Norvex Zentra Lumina Delphi Quanta Vireo Apex Boreal Cobalt Dynamo Ember Helix Kestrel Magna
    Nimbus Onyx Prism Sirius Tundra Vector Xenon Zephyr
""")
BRANCH = _words("""
    Labs Works Group Media Press Motors Foods Films Bank Energy
""")

YEARS = tuple(str(year) for year in range(1950, 1990))


def split_of(name: str) -> str:
    """The split that owns a name: 70 % train, 10 % dev, 20 % test, by a hash of the name."""
    bucket = zlib.crc32(name.encode()) % 10
    return "train" if bucket < 7 else "dev" if bucket == 7 else "test"


def _forms(kind: str) -> tuple[list[str], ...]:
    """All names of a kind, a list for each form: forms are equally likely, whatever their size."""

    def joined(*words: tuple[str, ...], pattern: str | None = None) -> list[str]:
        pattern = pattern or " ".join(["{}"] * len(words))
        return [pattern.format(*choice) for choice in product(*words)]

    if kind in ("woman", "man"):
        first = FEMALE if kind == "woman" else MALE
        return (joined(first, LAST),)
    if kind == "city":
        return (joined(PLACE, ROOT),)
    if kind == "film":
        return joined(MOOD, THING), joined(MOOD, THING, pattern="The {} {}")
    if kind == "book":
        return (joined(WORK, MATTER, pattern="{} of {}"),)
    if kind == "company":
        return (joined(FIRM, BRANCH),)
    raise ValueError(f"unknown kind of name '{kind}'")


@cache
def names(kind: str, split: str) -> tuple[tuple[str, ...], ...]:
    """Returns the names of a kind that belong to a split, one tuple for each form.

    Args:
        kind: ``woman``, ``man``, ``city``, ``film``, ``book`` or ``company``.
        split: ``train``, ``dev`` or ``test``.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}'; available: {', '.join(SPLITS)}")
    return tuple(tuple(n for n in form if split_of(n) == split) for form in _forms(kind))


def draw_name(rng: Random, kind: str, split: str, taken: set[str]) -> str:
    """Draws a name that is not taken yet in this world, and takes it."""
    while True:
        name = rng.choice(rng.choice(names(kind, split)))
        if name not in taken:
            taken.add(name)
            return name
