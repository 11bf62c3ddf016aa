"""What can be said and asked in a synthetic world: kinds of entities and their relations."""

from __future__ import annotations

from dataclasses import dataclass

KINDS = ("person", "film", "book", "company", "city")


@dataclass(frozen=True)
class Relation:
    """One thing that can be true of an entity.

    Attributes:
        name: Unique name.
        subject: Kind of the entity that it is said of.
        target: Kind of the value: a kind of entity, or ``year``.
        facts: Sentences with ``{s}`` (always first, so that a pronoun fits) and ``{o}``.
        questions: Questions with ``{s}``, whose answer is the value.
        role: Noun phrase with ``{s}`` that stands for the value, alone or in a longer question.
        place: Number of the list item, 0 if the relation is not an item of a list.
    """

    name: str
    subject: str
    target: str
    facts: tuple[str, ...]
    questions: tuple[str, ...]
    role: str
    place: int = 0

    @property
    def plain_fact(self) -> str:
        """The wording with the name at the end, right before the value."""
        return f"T{self.role[1:]} is {{o}}."

    @property
    def plain_question(self) -> str:
        """The wording with the name at the end."""
        return f"{'Who' if self.target == 'person' else 'What'} is {self.role}?"


def _relation(subject, name, target, facts, questions, role, place=0) -> Relation:
    split = lambda text: tuple(part.strip() for part in text.split("|"))  # noqa: E731
    return Relation(
        f"{subject}.{name}", subject, target, split(facts), split(questions), role, place
    )


ORDINALS = ("", "first", "second", "third", "fourth")

RELATIONS = (
    _relation("person", "birthplace", "city",
              "{s} was born in {o}. | {s} comes from {o}.",
              "Where was {s} born? | Where does {s} come from?", "the birthplace of {s}"),
    _relation("person", "employer", "company",
              "{s} works for {o}. | {s} is employed by {o}.",
              "Who does {s} work for? | Who employs {s}?", "the employer of {s}"),
    _relation("person", "teacher", "person",
              "{s} studied under {o}. | {s} was taught by {o}.",
              "Who taught {s}? | Who did {s} study under?", "the teacher of {s}"),
    _relation("film", "director", "person",
              "{s} was directed by {o}. | {s} had {o} as director.",
              "Who directed {s}? | Who was the director of {s}?", "the director of {s}"),
    _relation("film", "scene", "city",
              "{s} is set in {o}. | {s} takes place in {o}.",
              "Where is {s} set? | Where does {s} take place?", "the setting of {s}"),
    _relation("film", "year", "year",
              "{s} was released in {o}. | {s} came out in {o}.",
              "When was {s} released? | When did {s} come out?", "the year of {s}"),
    _relation("book", "writer", "person",
              "{s} was written by {o}. | {s} is the work of {o}.",
              "Who wrote {s}? | Who was the writer of {s}?", "the writer of {s}"),
    _relation("book", "publisher", "company",
              "{s} was published by {o}. | {s} was printed by {o}.",
              "Who published {s}? | Who printed {s}?", "the publisher of {s}"),
    _relation("company", "founder", "person",
              "{s} was founded by {o}. | {s} was started by {o}.",
              "Who founded {s}? | Who started {s}?", "the founder of {s}"),
    _relation("company", "seat", "city",
              "{s} is based in {o}. | {s} has its head office in {o}.",
              "Where is {s} based? | Where is the head office of {s}?", "the seat of {s}"),
    _relation("city", "mayor", "person",
              "{s} elected {o} as mayor. | {s} is run by mayor {o}.",
              "Who is the mayor of {s}? | Who runs {s}?", "the mayor of {s}"),
    _relation("city", "twin", "city",
              "{s} is twinned with {o}. | {s} has a twin city in {o}.",
              "Which city is twinned with {s}? | What is the twin city of {s}?",
              "the twin city of {s}"),
    *(
        _relation("film", f"part_{place}", "person", f"{ordinal}, {{o}}",
                  f"Who plays the {ordinal} part in {{s}}? | "
                  f"Who is {ordinal} in the cast of {{s}}?",
                  f"the {ordinal} player in {{s}}", place=place)
        for place, ordinal in enumerate(ORDINALS) if place
    ),
)  # fmt: skip

COMPARED = {"film.year": "Which film came out {when}, {a} or {b}?"}
"""Questions about two years of one relation; ``{when}`` is ``earlier`` or ``later``."""

FILLERS = (
    "The weather was mild that year.",
    "Little else is known.",
    "Many people remember this well.",
    "The archive keeps a copy.",
)


def relations_of(kind: str, *, listed: bool = False) -> tuple[Relation, ...]:
    """Returns the relations of a kind of entity: sentences, or with ``listed`` a list's items."""
    return tuple(r for r in RELATIONS if r.subject == kind and bool(r.place) == listed)
