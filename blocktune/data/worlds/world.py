"""A synthetic world: entities with one document each, the facts they state, and their passages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

from blocktune.data.worlds.vocabulary import (
    FILLERS,
    KINDS,
    ROOT,
    SPLITS,
    YEARS,
    Relation,
    draw_name,
    relations_of,
)
from blocktune.prompt import Chunk
from blocktune.registry import require_count, require_one_of, require_share

QUESTION_KINDS = ("self-contained", "cross-chunk", "2-hop", "3-hop", "comparison", "referred")
"""Kinds of questions. ``referred``, for pre-training, only tests following a reference: it uses a
later chunk's words for the entity ("Where was she born?")."""
DEFAULT_KINDS = {"self-contained": 0.3, "cross-chunk": 0.3, "2-hop": 0.3}
DEFAULT_KINDS |= {"3-hop": 0.05, "comparison": 0.05}


@dataclass(frozen=True)
class WorldConfig:
    """Options of the generator."""

    split: str = "train"  # one of ``SPLITS``, which share no names
    seed: int = 0  # other seeds give other worlds, with names of the same split
    num_examples: int = 1000  # total number of questions
    num_passages: int | tuple[int, int] = 10  # chunks per context, or (minimum, maximum)
    # weights of kinds of questions; others are not asked
    kinds: Mapping[str, float] = field(default_factory=lambda: DEFAULT_KINDS)
    questions_per_world: int = 1  # examples that share a context
    turns: int = 1  # questions per example, for training: the first and followups, if there are any
    # share of continued documents (except lists) whose later chunks use an alias; the others use
    # "she" or "the film", which can be guessed from the question
    aliased: float = 0.5
    # several documents of a kind may continue in other chunks, instead of one; then only the
    # preceding chunk tells to which document a later chunk belongs
    crowded: bool = False
    plain: bool = False  # see `draw_style`; every document is one chunk

    def __post_init__(self):
        require_one_of("split", self.split, SPLITS)
        for kind in self.kinds:
            require_one_of("kind", kind, QUESTION_KINDS)
        if not self.kinds or min(self.kinds.values()) <= 0:
            raise ValueError(f"kinds must have positive weights, got {dict(self.kinds)}")
        low, high = self.passage_range
        if not 1 <= low <= high:
            raise ValueError(f"num_passages must be at least 1 and ascending, got {(low, high)}")
        if set(self.kinds) == {"cross-chunk"} and (high < 2 or self.plain):
            raise ValueError("kind 'cross-chunk' needs two passages, and worlds that are not plain")
        require_share("aliased", self.aliased)
        for name in ("num_examples", "questions_per_world", "turns"):
            require_count(name, getattr(self, name), 1)
        if self.questions_per_world > 1 and self.turns > 1:
            raise ValueError("set only one of questions_per_world and turns")

    @property
    def passage_range(self) -> tuple[int, int]:
        """Smallest and largest number of chunks."""
        size = self.num_passages
        return (size, size) if isinstance(size, int) else size


@dataclass(frozen=True)
class Entity:
    """A person or thing."""

    name: str  # unique in its world
    kind: str  # one of `KINDS`
    pronoun: str  # she, he or it
    noun: str  # woman, man, or its kind
    root: str  # what later passages may call it (``the Webb``); its first passage explains it


@dataclass(frozen=True)
class Fact:
    """A relation of an entity to a value; ``target`` is the entity named by ``value``, if any."""

    subject: Entity
    relation: Relation
    value: str
    target: Entity | None = None


@dataclass(frozen=True)
class Style:
    """Layout of a world; drawn for each world, since a fixed layout would teach positions."""

    kind_weights: tuple[float, ...]  # probabilities of the `KINDS`, not normalised
    split: float  # probability that a document continues in another chunk
    facts: int  # maximum number of facts in a chunk
    linked: float  # probability that a value names an entity of this world
    introduced: float  # probability that a document starts by saying what its entity is
    filler: float  # probability of a filler sentence before a fact
    variety: int  # maximum number of relations per kind; with few, many facts are alike
    # probability that a sentence with the entity's name starts with the relation
    # (`Relation.plain_fact`), and that a question ends with the name
    roles: float


def draw_style(rng: Random, plain: bool) -> Style:
    """Draws a style. Most worlds have mainly entities of one kind, so that many facts are alike.

    A plain one, for the start of pre-training, has one kind and few relations in one wording.
    """
    main = rng.choice(KINDS)
    if plain:
        return Style(
            kind_weights=tuple(float(kind == main) for kind in KINDS),
            split=0,
            facts=rng.choice((1, 1, 2)),
            linked=0,
            introduced=0.3,  # distances must vary, or the model learns them instead of names
            filler=0.1,
            variety=rng.choice((1, 1, 2)),
            roles=1,
        )
    boost = rng.choice((1, 4, 20))
    return Style(
        kind_weights=tuple(rng.expovariate(1) + boost * (kind == main) for kind in KINDS),
        split=rng.choice((0.2, 0.5, 0.8)),
        facts=rng.choice((1, 2, 2, 3)),
        linked=rng.choice((0.4, 0.8)),
        introduced=0.2,
        filler=rng.choice((0, 0, 0.15, 0.3)),
        variety=rng.choice((2, 3, 9)),
        roles=0.3,
    )


@dataclass
class Document:
    """An entity, and its facts by chunk. The first chunk has a title; later chunks continue it."""

    entity: Entity
    parts: list[list[Fact]] = field(default_factory=list)
    # how later chunks refer to the entity: ``pronoun`` ("she"), ``description`` ("the film"),
    # ``alias`` ("the Webb", which the first chunk explains), or ``list`` (a list continued)
    mention: str = "alias"


class Place(NamedTuple):
    """Where a fact is stated, and how its entity is mentioned there."""

    chunk: int  # index of the chunk
    first: int  # index of the document's first chunk
    mention: str  # "name" in a first chunk, else `Document.mention`


@dataclass(frozen=True)
class World:
    """Documents, their chunks in order, and facts with places by (entity name, relation name)."""

    documents: tuple[Document, ...]
    style: Style
    facts: dict[tuple[str, str], Fact] = field(default_factory=dict)
    places: dict[tuple[str, str], Place] = field(default_factory=dict)
    chunks: list[Chunk] = field(default_factory=list)


def draw_world(rng: Random, config: WorldConfig) -> World:
    """Draws and writes a world, of a size in ``config.passage_range``.

    Unless the world is crowded, at most one document per kind continues in other chunks, so that
    "she", "the film", an alias or "the cast" can only mean that document.
    """
    room = rng.randint(*config.passage_range)
    style, taken, documents = draw_style(rng, config.plain), set(), []
    themes = {kind: _theme(rng, kind, style.variety) for kind in KINDS}
    continued: set[str] = set()  # kinds that have a continued document, and their pronouns
    while room:
        kind = rng.choices(KINDS, style.kind_weights)[0]
        form = rng.choice(("woman", "man")) if kind == "person" else kind
        name = draw_name(rng, form, config.split, taken, apart=not config.plain)
        pronoun = {"woman": "she", "man": "he"}.get(form, "it")
        root = rng.choice([word for word in ROOT if word not in taken] or ROOT)
        taken.add(root)
        entity = Entity(name, kind, pronoun, form, root)
        document = _outline(rng, entity, themes[kind], style, 1 if kind in continued else room)
        if len(document.parts) > 1:
            if document.parts[0][0].relation.place:
                document.mention = "list"
            elif rng.random() >= config.aliased:
                words = ("pronoun", "description")
                document.mention = words[1] if pronoun in continued else rng.choice(words)
            if not config.crowded:
                continued |= {kind, pronoun if document.mention == "pronoun" else ""}
        documents.append(document)
        room -= len(document.parts)
    entities = [document.entity for document in documents]
    world = World(tuple(documents), style)
    for document in documents:
        for part in document.parts:
            for i, fact in enumerate(part):
                part[i] = _fill(rng, fact, entities, style, config.split, taken)
                world.facts[fact.subject.name, fact.relation.name] = part[i]
    _write_chunks(rng, world)
    return world


def _theme(rng: Random, kind: str, variety: int) -> list[Relation]:
    """Draws the relations of a kind that a world uses: some of its sentences, or its list."""
    if kind == "film" and variety > 1 and rng.random() < 0.25:
        return list(relations_of(kind, listed=True))
    relations = relations_of(kind)
    return rng.sample(relations, min(variety, len(relations)))


def _outline(
    rng: Random, entity: Entity, theme: list[Relation], style: Style, room: int
) -> Document:
    """Chooses the number of a document's chunks and their relations, without values."""
    left = list(theme) if theme[0].place else rng.sample(theme, len(theme))
    size = 1
    while size < min(3, room, len(left)) and rng.random() < style.split:
        size += 1
    document = Document(entity)
    for later in reversed(range(size)):
        count = min(rng.randint(1, style.facts), len(left) - later)
        document.parts.append([Fact(entity, relation, "") for relation in left[:count]])
        left = left[count:]
    return document


def _fill(
    rng: Random, fact: Fact, entities: list[Entity], style: Style, split: str, taken: set[str]
) -> Fact:
    """Draws a fact's value; an entity that has a document makes a second hop possible."""
    kind = fact.relation.target
    if kind == "year":
        return Fact(fact.subject, fact.relation, rng.choice(YEARS))
    linkable = [e for e in entities if e.kind == kind and e != fact.subject]
    linkable = [] if fact.relation.place > 1 else linkable  # nobody plays two parts
    if linkable and rng.random() < style.linked:
        target = rng.choice(linkable)
        return Fact(fact.subject, fact.relation, target.name, target)
    form = rng.choice(("woman", "man")) if kind == "person" else kind
    return Fact(fact.subject, fact.relation, draw_name(rng, form, split, taken))


def _write_chunks(rng: Random, world: World) -> None:
    """Writes the chunks of all documents of a world, in order, with random wording."""
    for document in world.documents:
        first = len(world.chunks)
        for part, facts in enumerate(document.parts):
            place = Place(len(world.chunks), first, document.mention if part else "name")
            world.places.update({(f.subject.name, f.relation.name): place for f in facts})
            text = " ".join(_sentences(rng, document, facts, part, world.style))
            world.chunks.append(Chunk(text, None if part else document.entity.name))


def _sentences(
    rng: Random, document: Document, facts: list[Fact], part: int, style: Style
) -> list[str]:
    entity = document.entity
    if facts[0].relation.place:  # a continued list has no other text
        items = "; ".join(fact.relation.facts[0].format(o=fact.value) for fact in facts)
        opening = "The cast goes on" if part else f"The cast of {entity.name}"
        return [f"{opening}: {items}."]
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
    """The words by which a later chunk refers to an entity; not for lists."""
    if mention == "pronoun":
        return entity.pronoun
    return f"the {entity.noun if mention == 'description' else entity.root}"
