"""Writes documents as passages: a titled chunk, then chunks that lean on the one before."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from blocktune.data.worlds.relations import FILLERS, ORDINALS
from blocktune.data.worlds.world import Document, Entity, Fact, Style, World
from blocktune.prompt import Chunk

MENTIONS = ("pronoun", "description", "alias")
"""How a continuation chunk refers to its entity, besides going on with a list."""


@dataclass(frozen=True)
class Place:
    """Where a fact stands: its chunk, the document's first, and how the entity is mentioned."""

    chunk: int
    first: int
    mention: str  # "name" in a first chunk, else one of MENTIONS or "list"

    @property
    def supporting(self) -> tuple[int, ...]:
        """The chunks that a reader needs for this fact."""
        return (self.chunk,) if self.chunk == self.first else (self.first, self.chunk)


@dataclass(frozen=True)
class Passages:
    """A world's chunks in order, and each fact's place by (entity name, relation name).

    ``roles`` is the world's `Style.roles`, for its questions.
    """

    chunks: tuple[Chunk, ...]
    places: dict[tuple[str, str], Place]
    roles: float


def write_passages(rng: Random, world: World) -> Passages:
    """Writes every document of a world, in order; ``rng`` is the source of all wording."""
    chunks: list[Chunk] = []
    places: dict[tuple[str, str], Place] = {}
    for document in world.documents:
        first = len(chunks)
        mention = rng.choice(MENTIONS)
        for part, facts in enumerate(document.parts):
            shown = "name" if part == 0 else "list" if document.listed else mention
            for fact in facts:
                key = fact.subject.name, fact.relation.name
                places[key] = Place(len(chunks), first, shown)
            text = _write(rng, document, facts, part, mention, world.style)
            chunks.append(Chunk(text, document.entity.name if part == 0 else None))
    return Passages(tuple(chunks), places, world.style.roles)


def _write(
    rng: Random, document: Document, facts: list[Fact], part: int, mention: str, style: Style
) -> str:
    entity = document.entity
    sentences = [_introduction(rng, document, mention, style)] if part == 0 else []
    if document.listed:
        return " ".join([*sentences, _listing(facts, goes_on=part > 0)]).strip()
    for i, fact in enumerate(facts):
        if rng.random() < style.filler:
            sentences.append(rng.choice(FILLERS))
        if part == 0:
            subject = entity.name if i == 0 or rng.random() < style.named else entity.pronoun
        else:
            subject = _mention(entity, mention if i == 0 else rng.choice((mention, "pronoun")))
        wordings = fact.relation.facts
        if subject == entity.name and rng.random() < style.roles:
            wordings = (fact.relation.plain_fact,)
        sentence = rng.choice(wordings).format(s=subject, o=fact.value)
        sentences.append(sentence[0].upper() + sentence[1:])
    return " ".join(s for s in sentences if s)


def _mention(entity: Entity, mention: str) -> str:
    return {
        "pronoun": entity.pronoun,
        "description": f"the {entity.noun}",
        "alias": entity.alias,
    }[mention]


def _introduction(rng: Random, document: Document, mention: str, style: Style) -> str:
    """The opening sentence; it must explain the description or the alias that later chunks use."""
    entity = document.entity
    if len(document.parts) == 1 and rng.random() >= style.introduced:
        return ""
    article = "an" if entity.noun[0] in "aeiou" else "a"
    what = f"{article} {entity.noun}"
    if mention == "alias" or rng.random() < 0.2:
        known = rng.choice(("known as", "often called"))
        return f"{entity.name}, {known} {entity.alias}, is {what}."
    return f"{entity.name} is {what}."


def _listing(facts: list[Fact], *, goes_on: bool) -> str:
    items = "; ".join(fact.relation.facts[0].format(o=fact.value) for fact in facts)
    opening = f"The list goes on: {items}" if goes_on else f"The cast, in order: {items}"
    return opening + (";" if facts[-1].relation.place < len(ORDINALS) - 1 else ".")
