"""Writes documents as passages: a titled chunk, then chunks that lean on the one before."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from blocktune.data.worlds.relations import FILLERS
from blocktune.data.worlds.world import Document, Entity, Fact, Style, World
from blocktune.prompt import Chunk


@dataclass(frozen=True)
class Place:
    """Where a fact stands: its chunk, the document's first, and how the entity is mentioned."""

    chunk: int
    first: int
    mention: str  # "name" in a first chunk, else `Document.mention`

    @property
    def supporting(self) -> tuple[int, ...]:
        """The chunk that states the fact, and the one that says whose it is."""
        return tuple(sorted({self.first, self.chunk}))


@dataclass(frozen=True)
class Passages:
    """A world's chunks in order, and each fact's place by (entity name, relation name).

    ``roles`` is the world's `Style.roles`, for its questions.
    """

    chunks: tuple[Chunk, ...]
    places: dict[tuple[str, str], Place]
    roles: float


def write_passages(rng: Random, world: World) -> Passages:
    """Writes every document of a world in order; ``rng`` is the source of all wording."""
    chunks: list[Chunk] = []
    places: dict[tuple[str, str], Place] = {}
    for document in world.documents:
        first = len(chunks)
        for part, facts in enumerate(document.parts):
            mention = document.mention if part else "name"
            for fact in facts:
                places[fact.subject.name, fact.relation.name] = Place(len(chunks), first, mention)
            text = " ".join(_write(rng, document, facts, part, world.style))
            chunks.append(Chunk(text, document.entity.name if part == 0 else None))
    return Passages(tuple(chunks), places, world.style.roles)


def _write(
    rng: Random, document: Document, facts: list[Fact], part: int, style: Style
) -> list[str]:
    """A chunk's sentences."""
    entity = document.entity
    if facts[0].relation.place:
        return [_listing(entity, facts, part)]
    subject = refer(entity, document.mention) if part else entity.name
    sentences = []
    if part == 0 and rng.random() < style.introduced:
        sentences.append(f"{subject} is a {entity.noun}.")
    if part == 0 and len(document.parts) > 1 and document.mention == "alias":
        known = rng.choice(("known as", "often called"))
        sentences.append(f"{subject} is {known} {refer(entity, 'alias')}.")
    for fact in facts:
        if rng.random() < style.filler:
            sentences.append(rng.choice(FILLERS))
        wordings = fact.relation.facts
        if part == 0 and rng.random() < style.roles:
            wordings = (fact.relation.plain_fact,)
        sentence = rng.choice(wordings).format(s=subject, o=fact.value)
        sentences.append(sentence[0].upper() + sentence[1:])
    return sentences


def refer(entity: Entity, mention: str) -> str:
    """The words for an entity that a chunk uses after the first; none in a list."""
    return {
        "pronoun": entity.pronoun,
        "description": f"the {entity.noun}",
        "alias": f"the {entity.root}",
    }[mention]


def _listing(entity: Entity, facts: list[Fact], part: int) -> str:
    """Items; a chunk that goes on with them says so and nothing else."""
    items = "; ".join(fact.relation.facts[0].format(o=fact.value) for fact in facts)
    opening = "The cast goes on" if part else f"The cast of {entity.name}"
    return f"{opening}: {items}."
