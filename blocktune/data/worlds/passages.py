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

    ``roles`` is the world's `Style.roles`, for its questions; ``references``, by the name of a
    document's entity, the words by which its later chunks speak of it, or would.
    """

    chunks: tuple[Chunk, ...]
    places: dict[tuple[str, str], Place]
    roles: float
    references: dict[str, str]


def write_passages(rng: Random, world: World, *, shuffled: bool = False) -> Passages:
    """Writes every document of a world.

    Args:
        rng: Source of all wording.
        world: What to write, in its order.
        shuffled: Chunks stand in any order; what a chunk leans on may come later, or far before.
    """
    chunks: list[Chunk] = []
    places: dict[tuple[str, str], Place] = {}
    references: dict[str, str] = {}
    for document in world.documents:
        first = len(chunks)
        mention = rng.choice(MENTIONS)
        for part, facts in enumerate(document.parts):
            shown = "name" if part == 0 else "list" if document.listed else mention
            for fact in facts:
                key = fact.subject.name, fact.relation.name
                places[key] = Place(len(chunks), first, shown)
            opening = _introduction(rng, document, mention, world.style) if part == 0 else ""
            if part == 0:
                later = "list" if document.listed else mention if opening else "pronoun"
                references[document.entity.name] = _refer(document.entity, later)
            text = _write(rng, document, facts, part, mention, world.style, opening)
            chunks.append(Chunk(text, document.entity.name if part == 0 else None))
    if shuffled:
        order = rng.sample(range(len(chunks)), len(chunks))
        chunks = [chunks[index] for index in order]
        places = {
            key: Place(order.index(place.chunk), order.index(place.first), place.mention)
            for key, place in places.items()
        }
    return Passages(tuple(chunks), places, world.style.roles, references)


def _write(
    rng: Random,
    document: Document,
    facts: list[Fact],
    part: int,
    mention: str,
    style: Style,
    opening: str,
) -> str:
    entity, sentences = document.entity, [opening]
    if document.listed:
        return " ".join([*sentences, _listing(facts, goes_on=part > 0)]).strip()
    for i, fact in enumerate(facts):
        if rng.random() < style.filler:
            sentences.append(rng.choice(FILLERS))
        if part == 0:
            subject = entity.name if i == 0 or rng.random() < style.named else entity.pronoun
        else:
            subject = _refer(entity, mention if i == 0 else rng.choice((mention, "pronoun")))
        wordings = fact.relation.facts
        if subject == entity.name and rng.random() < style.roles:
            wordings = (fact.relation.plain_fact,)
        sentence = rng.choice(wordings).format(s=subject, o=fact.value)
        sentences.append(sentence[0].upper() + sentence[1:])
    return " ".join(s for s in sentences if s)


def _refer(entity: Entity, mention: str) -> str:
    return {
        "pronoun": entity.pronoun,
        "description": f"the {entity.noun}",
        "alias": entity.alias,
        "list": "the list",
    }[mention]


def _introduction(rng: Random, document: Document, mention: str, style: Style) -> str:
    """The opening sentence, which tells how later chunks will refer to the entity.

    It gives an alias or says what the entity is, where they use that, and there is none where
    they say "she" or "it".
    """
    entity = document.entity
    alone = len(document.parts) == 1 and rng.random() >= style.introduced
    if alone or (mention == "pronoun" and not document.listed):
        return ""
    if mention == "alias" and not document.listed:
        return f"{entity.name} is {rng.choice(('known as', 'often called'))} {entity.alias}."
    article = "an" if entity.noun[0] in "aeiou" else "a"
    return f"{entity.name} is {article} {entity.noun}."


def _listing(facts: list[Fact], *, goes_on: bool) -> str:
    items = "; ".join(fact.relation.facts[0].format(o=fact.value) for fact in facts)
    opening = f"The list goes on: {items}" if goes_on else f"The cast, in order: {items}"
    return opening + (";" if facts[-1].relation.place < len(ORDINALS) - 1 else ".")
