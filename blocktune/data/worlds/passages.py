"""Writes documents as passages: a titled chunk, then chunks that lean on the one before."""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from blocktune.data.worlds.relations import FILLERS, ORDINALS
from blocktune.data.worlds.world import Document, Entity, Fact, Style, World
from blocktune.prompt import Chunk

MENTIONS = ("pronoun", "description", "alias")
"""How a continuation chunk refers to its entity, besides going on with a list."""
_WEIGHTS = (1, 2, 2)


@dataclass(frozen=True)
class Place:
    """Where a fact stands: its chunk, the document's first, and how the entity is mentioned."""

    chunk: int
    first: int
    mention: str  # "name" in a first chunk, else one of MENTIONS or "list"

    @property
    def supporting(self) -> tuple[int, ...]:
        """The chunks that a reader needs for this fact."""
        return tuple(sorted({self.first, self.chunk}))


@dataclass(frozen=True)
class Passages:
    """A world's chunks in order, and each fact's place by (entity name, relation name).

    ``roles`` is the world's `Style.roles`, for its questions. ``references`` holds the words by
    which a document's later chunks speak of its entity, or would, by the entity's name; documents
    whose first chunk does not tell are left out, as theirs say "she" or "it".
    """

    chunks: tuple[Chunk, ...]
    places: dict[tuple[str, str], Place]
    roles: float
    references: dict[str, str]


def write_passages(rng: Random, world: World, *, shuffled: bool = False) -> Passages:
    """Writes every document of a world; ``rng`` is the source of all wording.

    In order, or ``shuffled``: chunks in any order, none of which leans on a pronoun.
    """
    chunks: list[Chunk] = []
    places: dict[tuple[str, str], Place] = {}
    references: dict[str, str] = {}
    pronouns: set[str] = set()
    for document in world.documents:
        first = len(chunks)
        mention = _choose_mention(rng, document, pronouns, shuffled)
        later = "list" if document.listed else mention
        opening = _introduction(rng, document, later, world.style)
        if opening:
            references[document.entity.name] = refer(document.entity, later)
        for part, facts in enumerate(document.parts):
            for fact in facts:
                key = fact.subject.name, fact.relation.name
                places[key] = Place(len(chunks), first, later if part else "name")
            opened = [opening] if opening and part == 0 else []
            text = " ".join(opened + _write(rng, document, facts, part, mention, world.style))
            chunks.append(Chunk(text, document.entity.name if part == 0 else None))
    passages = Passages(tuple(chunks), places, world.style.roles, references)
    return _shuffled(rng, passages) if shuffled else passages


def _choose_mention(rng: Random, document: Document, pronouns: set[str], shuffled: bool) -> str:
    """How later chunks speak of the entity: by a pronoun only if no other document does by it."""
    mention = rng.choices(MENTIONS, _WEIGHTS)[0]
    if mention != "pronoun" or len(document.parts) == 1 or document.listed:
        return mention
    if shuffled or document.entity.pronoun in pronouns:
        return rng.choice(MENTIONS[1:])
    pronouns.add(document.entity.pronoun)
    return mention


def _shuffled(rng: Random, passages: Passages) -> Passages:
    order = rng.sample(range(len(passages.chunks)), len(passages.chunks))
    moved = {old: new for new, old in enumerate(order)}
    places = {
        key: Place(moved[place.chunk], moved[place.first], place.mention)
        for key, place in passages.places.items()
    }
    return replace(passages, chunks=tuple(passages.chunks[i] for i in order), places=places)


def _write(
    rng: Random, document: Document, facts: list[Fact], part: int, mention: str, style: Style
) -> list[str]:
    """A chunk's sentences, but for the opening."""
    entity, sentences = document.entity, []
    if document.listed:
        return [_listing(document, facts)]
    for i, fact in enumerate(facts):
        if rng.random() < style.filler:
            sentences.append(rng.choice(FILLERS))
        if part == 0:
            subject = entity.name if i == 0 or rng.random() < style.named else entity.pronoun
        else:
            subject = refer(entity, mention if i == 0 else rng.choice((mention, "pronoun")))
        wordings = fact.relation.facts
        if subject == entity.name and rng.random() < style.roles:
            wordings = (fact.relation.plain_fact,)
        sentence = rng.choice(wordings).format(s=subject, o=fact.value)
        sentences.append(sentence[0].upper() + sentence[1:])
    return sentences


def refer(entity: Entity, mention: str) -> str:
    """The words for an entity that a chunk uses after the first."""
    return {
        "pronoun": entity.pronoun,
        "description": f"the {entity.root} {entity.noun}",
        "alias": f"the {entity.root}",
        "list": f"the {entity.root} cast",
    }[mention]


def _introduction(rng: Random, document: Document, mention: str, style: Style) -> str:
    """The opening sentence, which tells the words that later chunks use; none for a pronoun."""
    words = refer(document.entity, mention)
    if mention == "list":
        return f"{document.entity.name} has {words}."
    alone = len(document.parts) == 1 and rng.random() >= style.introduced
    if alone or mention == "pronoun":
        return ""
    known = rng.choice(("known as ", "often called ")) if mention == "alias" else ""
    return f"{document.entity.name} is {known}{words}."


def _listing(document: Document, facts: list[Fact]) -> str:
    items = "; ".join(fact.relation.facts[0].format(o=fact.value) for fact in facts)
    ended = facts[-1].relation.place == len(ORDINALS) - 1
    return f"The {document.entity.root} cast: {items}" + ("." if ended else ";")
