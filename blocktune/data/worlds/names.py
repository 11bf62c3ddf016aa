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
    Anna Clara Dora Edith Fiona Greta Helen Iris Julia Karen Laura Maria Nora Olga Paula
    Rita Sara Tessa Ursula Vera Wanda Yvonne Zelda Betty
""")
MALE = _words("""
    Adam Boris Carl David Evan Frank George Henry Ivan Jack Kevin Leo Martin Noel Oscar
    Peter Quentin Robert Simon Thomas Victor Walter Xavier Bruno
""")
MIDDLE = _words("""
    Ash Bay Cole Dale Elm Fay Gray Hale
""")
LAST = _words("""
    Abbot Baker Belt Carter Cross Dalton Doyle Ellis Falk Finch Fisher Garner Grant Hansen
    Harper Holt Hunter Jensen Keller Kemp Lang Lowell Marsh Mason Miller Nash Norris Olsen
    Parker Pike Quill Reed Rhodes Sawyer Sharp Stone Sutton Tanner Tate Turner Vance Wade
    Walsh Weaver Webb Wolf Yates York
""")
NICKNAME = _words("""
    Ace Badger Bear Duke Falcon Flint Fox Ghost Hawk Jinx Lucky Moose Otter Panda Raven
    Robin Rocket Rusty Scout Shadow Sparrow Tiger Ziggy Wren
""")

PLACE = _words("""
    Port Lake New Old Fort Mount East West North South Saint Upper
""")
ROOT = _words("""
    Alder Arden Barrow Blyth Calder Corran Darby Denver Elgin Esk Fenwick Garth Hollow
    Humber Jarrow Kelso Kirby Linden Lorne Malden Melrose Nairn Newbury Oban Orford Penrith
    Perth Ripley Ross Selby Skye Stirling Tarn Thorne Troon Ulster Verwood Wexford Whitby
    Yarrow
""")

MOOD = _words("""
    Silent Broken Golden Hidden Crimson Frozen Bitter Burning Distant Empty Fallen Gentle
    Hollow Iron Lonely Narrow Pale Quiet Restless Scarlet Secret Velvet Wild Winter
""")
THING = _words("""
    Harbor Garden River Mirror Island Forest Bridge Castle Desert Engine Feather Ladder
    Lantern Market Meadow Mountain Ocean Orchard Palace Piano Road Signal Station Summer
    Tower Train Valley Window Storm Shore
""")

WORK = _words("""
    Letters Songs Tales Maps Shores Clocks Roads Birds Bells Doors Rivers Stars Stones Walls
    Winds Wolves Ships Seeds Roots Rooms
""")
MATTER = _words("""
    Salt Ash Glass Silver Smoke Dust Amber Clay Copper Snow Rain Sand Ice Wood Paper Bronze
    Wool Steel Honey Fire
""")

FIRM = _words("""
    Norvex Zentra Lumina Corvex Delphi Quanta Vireo Apex Boreal Cobalt Dynamo Ember Fulcrum
    Helix Ionix Kestrel Lyra Magna Nimbus Onyx Prism Rondo Sirius Tundra Umbra Vector Wavex
    Xenon Zephyr Orion
""")
BRANCH = _words("""
    Labs Works Group Media Press Motors Foods Films Bank Energy
""")
HOLDING = _words("""
    United Royal General First Global Modern
""")

YEARS = tuple(str(year) for year in range(1930, 1990))


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
        return joined(first, LAST), joined(first, LAST), joined(first, MIDDLE, LAST)
    if kind == "city":
        return (joined(PLACE, ROOT),)
    if kind == "film":
        return joined(MOOD, THING), joined(MOOD, THING, pattern="The {} {}")
    if kind == "book":
        return joined(WORK, MATTER, pattern="{} of {}"), joined(WORK, THING, pattern="{} of the {}")
    if kind == "company":
        return joined(FIRM, BRANCH), joined(HOLDING, FIRM, BRANCH)
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
