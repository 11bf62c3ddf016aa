"""Vocabulary of the synthetic worlds: names, and kinds of entities with their relations."""

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
    kind: tuple((pattern, _WORDS[words]) for pattern, words in forms.items())
    for kind, forms in _DATA["forms"].items()
}


_ROOTS = frozenset(ROOT)


@cache
def names(kind: str, split: str) -> tuple[tuple[str, ...], ...]:
    """Names of a kind in a split, as one tuple per form; a name's hash determines its split."""
    owners = ("train",) * 7 + ("dev", "test", "test")
    forms = ([pattern.format(*c) for c in product(words, ROOT)] for pattern, words in _FORMS[kind])
    return tuple(
        tuple(name for name in form if owners[zlib.crc32(name.encode()) % 10] == split)
        for form in forms
    )


def draw_name(rng: Random, kind: str, split: str, taken: set[str], *, apart: bool = False) -> str:
    """Draws an unused name for a world, and adds it and its root to ``taken``.

    While unused ones remain, names share no root, or no word if ``apart``: small models take long
    to learn to distinguish Anna Baker from Port Baker, which is not measured.
    """
    for attempt in range(2000):
        name = rng.choice(rng.choice(names(kind, split)))
        words = set(name.split()) - {"The", "of"}
        reserved = words if apart else words & _ROOTS
        if name not in taken and (attempt >= 40 or not reserved & taken):
            taken |= reserved | {name}
            return name
    raise ValueError(f"split '{split}' has too few names of kind '{kind}'; ask for fewer passages")


KINDS = ("person", "film", "book", "company", "city")


@dataclass(frozen=True)
class Relation:
    """A relation between an entity (``{s}`` in the wordings) and a value (``{o}``)."""

    name: str  # unique; starts with the kind of the entity
    target: str  # kind of the value: a kind of entity, or ``year``
    facts: tuple[str, ...]  # sentences that start with ``{s}``, which may be a pronoun
    questions: tuple[str, ...]  # questions whose answer is the value
    role: str  # what the value is called in multi-hop questions, such as ``the birthplace of {s}``
    place: int = 0  # number of the list item; 0 if the relation is not part of a list

    @property
    def plain_fact(self) -> str:
        """The wording with the name directly before the value."""
        return f"T{self.role[1:]} is {{o}}."

    @property
    def plain_question(self) -> str:
        """The wording with the name at the end."""
        return f"{'Who' if self.target == 'person' else 'What'} is {self.role}?"


RELATIONS = tuple(
    Relation(
        **{"role": f"the {entry['name'].partition('.')[2]} of {{s}}"}
        | entry
        | {key: tuple(entry[key]) for key in ("facts", "questions")}
    )
    for entry in _DATA["relations"]
)
RELATIONS += tuple(
    Relation(
        f"film.part_{place}",
        "person",
        (f"{nth}, {{o}}",),
        (f"Who plays the {nth} part in {{s}}?", f"Who is {nth} in the cast of {{s}}?"),
        f"the {nth} player in {{s}}",
        place,
    )
    for place, nth in enumerate(("first", "second", "third", "fourth"), start=1)
)


def relations_of(kind: str, *, listed: bool = False) -> tuple[Relation, ...]:
    """Returns the relations of a kind of entity: those in sentences, or ``listed`` ones."""
    named = (r for r in RELATIONS if r.name.startswith(f"{kind}."))
    return tuple(relation for relation in named if bool(relation.place) == listed)
