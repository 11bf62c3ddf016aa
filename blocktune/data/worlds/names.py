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


ROOT = _words("""
    Abbot Alder Archer Baker Barrow Bishop Calder Carter Corby Dalton Denver Draper Elgin Ellis
    Emery Fenwick Fisher Foster Garner Garth Gibson Harper Hexham Hollow Ingram Irving Jarrow
    Jensen Jordan Keller Kirby Knight Lang Linden Ludlow Mason Melrose Miller Newbury Nolan Norris
    Oakham Olsen Orford Parker Penrith Quill Ramsey Reed Ross Sawyer Selby Sutton Tanner Tarn
    Turner Upton Vance Walsh Webb Whitby Yarrow Yates York
""")
"""What tells one name from another, whatever its kind; the other word tells the kind."""

FEMALE = _words("Anna Clara Dora Edith Fiona Greta Helen Iris Julia Karen Laura Maria")
MALE = _words("Adam Boris Carl David Evan Frank George Henry Ivan Jack Kevin Leo")
PLACE = _words("Port Lake New Old Fort Mount East West North South Upper Lower")
MOOD = _words(
    "Silent Broken Golden Hidden Crimson Frozen Bitter Burning Distant Empty Gentle Lonely"
)
WORK = _words("Letters Songs Tales Maps Clocks Birds Bells Doors Rivers Stars Walls Winds")
FIRM = _words("Studio Bank House Radio Hotel Circus Theatre Garage Mill Press Gallery Casino")

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
        return (joined(FEMALE if kind == "woman" else MALE, ROOT),)
    if kind == "city":
        return (joined(PLACE, ROOT),)
    if kind == "film":
        return joined(MOOD, ROOT), joined(MOOD, ROOT, pattern="The {} {}")
    if kind == "book":
        return (joined(WORK, ROOT, pattern="{} of {}"),)
    if kind == "company":
        return (joined(FIRM, ROOT),)
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


_ROOTS = frozenset(ROOT)
_PATIENCE, _MOST_DRAWS = 40, 2000


def draw_name(rng: Random, kind: str, split: str, taken: set[str], *, apart: bool = False) -> str:
    """Draws a name for one world, and takes it and its root; if ``apart``, its other word too.

    Within a world no two names have their root in common, as long as there are roots left: telling
    apart Anna Baker and Port Baker is more than a model of a million parameters learns in an
    hour, and it is not what is measured. Names that are drawn apart have no word in common with
    one another.

    Raises:
        ValueError: If the world has used up the names of this kind.
    """
    for drawn in range(_MOST_DRAWS):
        name = rng.choice(rng.choice(names(kind, split)))
        words = set(name.split()) - {"The", "of"}
        own = words if apart else words & _ROOTS
        if name not in taken and (drawn >= _PATIENCE or not own & taken):
            taken |= own | {name}
            return name
    raise ValueError(
        f"split '{split}' has no names of kind '{kind}' left for this world; ask for fewer passages"
    )


def draw_root(rng: Random, taken: set[str]) -> str:
    """Draws a root that no name of a world has, as long as there are any, and takes it."""
    root = rng.choice([word for word in ROOT if word not in taken] or ROOT)
    taken.add(root)
    return root
