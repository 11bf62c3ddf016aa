"""Vocabulary of the synthetic worlds: names, kinds of entities, and what can be said of them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from random import Random

import yaml

SPLITS = ("train", "dev", "test")


_DATA = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text())
_WORDS = {name: tuple(text.split()) for name, text in _DATA["words"].items()}
ROOT, COMPARED, FILLERS = _WORDS["root"], _DATA["compared"], tuple(_DATA["fillers"])
YEARS = tuple(str(year) for year in range(1950, 1990))


_FORMS = {
    kind: tuple((pattern, _WORDS[own]) for pattern, own in forms.items())
    for kind, forms in _DATA["forms"].items()
}


@cache
def names(kind: str, split: str) -> tuple[tuple[str, ...], ...]:
    """The names of a kind, one of `_FORMS`, that belong to a split, one tuple for each form.

    A name belongs to one by its hash: 70 % to train, 10 % to dev, 20 % to test.
    """
    owners = ("train",) * 7 + ("dev", "test", "test")
    forms = ([pattern.format(*c) for c in product(words, ROOT)] for pattern, words in _FORMS[kind])
    return tuple(
        tuple(name for name in form if owners[zlib.crc32(name.encode()) % 10] == split)
        for form in forms
    )


_ROOTS = frozenset(ROOT)
_PATIENCE, _MOST_DRAWS = 40, 2000


def draw_name(rng: Random, kind: str, split: str, taken: set[str], *, apart: bool = False) -> str:
    """Draws a name for one world, and takes it and its root; if ``apart``, its other word too.

    Within a world no two names share a root while unused roots remain: a model of a million
    parameters does not learn within an hour to distinguish Anna Baker from Port Baker, which is not
    what is measured. Names drawn ``apart`` share no word.
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
    """Draws a root that no name of a world has, while there are any, and takes it."""
    root = rng.choice([word for word in ROOT if word not in taken] or ROOT)
    taken.add(root)
    return root


KINDS = ("person", "film", "book", "company", "city")


@dataclass(frozen=True)
class Relation:
    """One thing that can be true of an entity."""

    name: str  # unique name
    subject: str  # kind of the entity that it is said of
    target: str  # kind of the value: a kind of entity, or ``year``
    facts: tuple[str, ...]  # sentences with ``{s}``, always first (as a pronoun), and ``{o}``
    questions: tuple[str, ...]  # questions with ``{s}``, whose answer is the value
    role: str  # noun phrase with ``{s}`` for the value, also used within longer questions
    place: int = 0  # number of the list item, 0 if the relation is not an item of a list

    @property
    def plain_fact(self) -> str:
        """The wording with the name at the end, right before the value."""
        return f"T{self.role[1:]} is {{o}}."

    @property
    def plain_question(self) -> str:
        """The wording with the name at the end."""
        return f"{'Who' if self.target == 'person' else 'What'} is {self.role}?"


RELATIONS = tuple(
    Relation(**one | {key: tuple(one[key]) for key in ("facts", "questions")})
    for one in _DATA["relations"]
)


def relations_of(kind: str, *, listed: bool = False) -> tuple[Relation, ...]:
    """Returns the relations of a kind of entity: sentences, or with ``listed`` a list's items."""
    return tuple(r for r in RELATIONS if r.subject == kind and bool(r.place) == listed)
