"""Synthetic multi-hop worlds in English: disjoint splits, bridges, chunks that need others.

The same configuration gives the same examples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain, combinations, count, islice
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

from blocktune.data.example import RagExample
from blocktune.data.worlds import world as worlds
from blocktune.data.worlds.vocabulary import COMPARED, SPLITS
from blocktune.data.worlds.world import Fact, Passages, Place, World, refer
from blocktune.prompt import Chunk
from blocktune.registry import require_count, require_one_of, require_share

QUESTION_KINDS = ("self-contained", "cross-chunk", "2-hop", "3-hop", "comparison", "referred")
"""The last asks by the words of a later chunk ("Where was she born?"): following a reference, by
itself, for pre-training."""
MARKER = "Answer: "  # precedes the scored answer when a response names other values first


@dataclass(frozen=True)
class WorldQuestion:
    """One question of a world, of one of `QUESTION_KINDS`, with its one correct answer.

    ``response`` is what a model is trained to say: the answer, or the values on the way, then
    `MARKER` and the answer. ``supporting`` are the chunks that are needed; for ``meta`` see `ask`.
    """

    kind: str
    text: str
    answer: str
    response: str
    supporting: tuple[int, ...]
    meta: dict[str, Any] = field(default_factory=dict)


def chains(world: World, hops: int) -> Iterator[tuple[Fact, ...]]:
    """Yields every chain of facts whose values are the next facts' subjects, never going back."""
    paths = [(fact,) for fact in world.facts.values()]
    by_subject: dict[str, list[Fact]] = {}
    for fact in world.facts.values():
        by_subject.setdefault(fact.subject.name, []).append(fact)
    for _ in range(hops - 1):
        paths = [
            (*path, fact)
            for path in paths
            if path[-1].target and not path[-1].relation.place
            for fact in by_subject.get(path[-1].value, ())
            if fact.value not in {past.subject.name for past in path}
        ]
    yield from paths


def candidates(world: World, passages: Passages) -> dict[str, list[tuple[Fact, ...]]]:
    """Groups everything that can be asked about a world by the kind of the question."""
    found: dict[str, list[tuple[Fact, ...]]] = {kind: [] for kind in QUESTION_KINDS}
    for fact in world.facts.values():
        place = _place(passages, fact)
        kind = "self-contained" if place.chunk == place.first else "cross-chunk"
        found[kind].append((fact,))
        # Whether its chunk's words for its subject alone tell which fact is asked for.
        if place.mention not in ("name", "list"):
            words = refer(fact.subject, place.mention)
            alike = (f.subject for f in world.facts.values() if f.relation == fact.relation)
            if [words == refer(one, place.mention) for one in alike].count(True) == 1:
                found["referred"].append((fact,))
    found["2-hop"] = list(chains(world, 2))
    found["3-hop"] = list(chains(world, 3))
    dated = [fact for fact in world.facts.values() if fact.relation.name in COMPARED]
    for one, other in combinations(dated, 2):
        if one.relation == other.relation and one.value != other.value:
            found["comparison"].append((one, other))
    return {kind: facts for kind, facts in found.items() if facts}


def ask(rng: Random, kind: str, facts: tuple[Fact, ...], passages: Passages) -> WorldQuestion:
    """Words a question.

    Its ``meta`` holds ``relations``; ``mentions``, how each fact's chunk refers to its subject
    (``name`` if titled); ``fact_chunks``, the chunk that states each fact; and for chains
    ``bridges``, the names between the question and the answer.
    """
    places = [_place(passages, fact) for fact in facts]
    meta: dict[str, Any] = {
        "relations": [fact.relation.name for fact in facts],
        "mentions": [place.mention for place in places],
        "fact_chunks": [place.chunk for place in places],
    }
    if kind == "comparison":
        one, other = facts if rng.random() >= 0.5 else facts[::-1]
        later = rng.random() < 0.5
        names = {"a": one.subject.name, "b": other.subject.name}
        text = COMPARED[one.relation.name].format(when="later" if later else "earlier", **names)
        winner = (max if later else min)(one, other, key=lambda fact: int(fact.value))
        answer, said = winner.subject.name, [one.value, other.value]
    elif kind == "referred":
        words = refer(facts[0].subject, places[0].mention)
        text = rng.choice(facts[0].relation.questions).format(s=words)
        answer, said = facts[0].value, []
    else:
        *before, last = facts
        subject = facts[0].subject.name
        for fact in before:
            subject = fact.relation.role.format(s=subject)
        by_role = rng.random() < passages.roles
        wordings = (last.relation.plain_question,) if by_role else last.relation.questions
        text, answer = rng.choice(wordings).format(s=subject), last.value
        said = meta["bridges"] = [fact.value for fact in before]
    response = f"{', '.join(said)}. {MARKER}{answer}" if said else answer
    supporting = tuple(sorted({i for place in places for i in (place.first, place.chunk)}))
    return WorldQuestion(kind, text, answer, response, supporting, meta)


def state(rng: Random, fact: Fact, roles: float) -> tuple[str, str, str]:
    """States a fact in full: the words up to the value, the value, and the rest."""
    relation = fact.relation
    by_role = relation.place or rng.random() < roles
    wording = relation.plain_fact if by_role else rng.choice(relation.facts)
    before, after = wording.format(s=fact.subject.name, o="|").split("|")
    return before, fact.value, after


def _place(passages: Passages, fact: Fact) -> Place:
    return passages.places[fact.subject.name, fact.relation.name]


DEFAULT_KINDS = MappingProxyType(
    {"self-contained": 0.3, "cross-chunk": 0.3, "2-hop": 0.3, "3-hop": 0.05, "comparison": 0.05}
)


@dataclass(frozen=True)
class WorldConfig:
    """What to generate."""

    split: str = "train"  # whose names to use: no two of ``SPLITS`` share a name
    seed: int = 0  # another seed gives other worlds of the same names
    num_examples: int = 1000  # number of questions in all
    num_passages: int | tuple[int, int] = 10  # chunks in each context, or smallest and largest
    # weight of each kind of question; kinds left out are not asked
    kinds: Mapping[str, float] = field(default_factory=lambda: DEFAULT_KINDS)
    questions_per_world: int = 1  # questions that share a context
    # questions that each example asks in turn about its context, for training: the first, then its
    # followups; fewer if the world has no more
    turns: int = 1
    # share of the continued documents (lists excluded) whose later chunks use an alias; the others
    # say "she" or "the film", which the question reveals
    aliased: float = 0.5
    # any number of documents of a kind continue in other chunks, instead of one: then only the
    # chunk before tells to which document a later chunk belongs
    crowded: bool = False
    # every statement names its entity, in one wording, and no document continues in another chunk;
    # the first stage of pre-training
    plain: bool = False

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
            raise ValueError(
                "a world's questions are examples or turns of one: set only one of "
                "questions_per_world and turns"
            )

    @property
    def passage_range(self) -> tuple[int, int]:
        """Smallest and largest number of chunks."""
        both = self.num_passages
        return (both, both) if isinstance(both, int) else both


def generate_examples(config: WorldConfig) -> Iterator[RagExample]:
    """Yields ``config.num_examples`` examples; example ``i`` is the same however many are drawn."""
    drawn = (_one_world(config, index) for index in count())
    yield from islice(chain.from_iterable(drawn), config.num_examples)


MOST_WORLDS = 5000  # worlds drawn in search of a question before giving up


class Context(NamedTuple):
    """Chunks, different questions about them, and all their facts restated with full names.

    A statement is split into what leads up to the value, the value, and the rest.
    """

    chunks: tuple[Chunk, ...]
    questions: tuple[WorldQuestion, ...]
    statements: tuple[tuple[str, str, str], ...]


def draw_context(rng: Random, config: WorldConfig, num_questions: int) -> Context:
    """Draws worlds until one can answer a question of the drawn kind; that question is first.

    Fewer than ``num_questions`` come back if the world has no more; ``config.seed`` is not read.
    """
    wanted = rng.choices(list(config.kinds), list(config.kinds.values()))[0]
    for _ in range(MOST_WORLDS):
        size = rng.randint(*config.passage_range)
        how = {"aliased": config.aliased, "crowded": config.crowded, "plain": config.plain}
        world = worlds.draw_world(rng, config.split, size, **how)
        passages = worlds.write_passages(rng, world)
        pools = candidates(world, passages)
        if wanted in pools:
            break
    else:
        raise ValueError(
            f"no question of kind '{wanted}' in {MOST_WORLDS} worlds of {config.num_passages} "
            "passages; ask for more passages, or leave the kind out"
        )
    pools = {k: rng.sample(pool, len(pool)) for k, pool in pools.items() if k in config.kinds}
    questions: list[WorldQuestion] = []
    while pools and len(questions) < num_questions:
        weights = [config.kinds[kind] for kind in pools]
        kind = rng.choices(list(pools), weights)[0] if questions else wanted
        questions.append(ask(rng, kind, pools[kind].pop(), passages))
        pools = {kind: pool for kind, pool in pools.items() if pool}
    facts = rng.sample(list(world.facts.values()), len(world.facts))
    return Context(
        passages.chunks, tuple(questions), tuple(state(rng, fact, passages.roles) for fact in facts)
    )


def _one_world(config: WorldConfig, index: int) -> list[RagExample]:
    rng = Random(f"{config.split}/{config.seed}/{index}")
    context = draw_context(rng, config, max(config.questions_per_world, config.turns))
    asked = context.questions[:1] if config.turns > 1 else context.questions
    later = context.questions[len(asked) :]
    followups = tuple((question.text, question.response) for question in later)
    # Augmentation must keep the evidence of every turn.
    turns = context.questions if later else ()
    evidence = tuple(sorted({index for turn in turns for index in turn.supporting}))
    return [
        RagExample(
            question=question.text,
            chunks=context.chunks,
            answers=(question.answer,),
            response=question.response,
            kind=question.kind,
            id=f"{config.split}-{config.seed}-{index}-{number}",
            supporting=evidence or question.supporting,
            meta=question.meta,
            followups=followups,
        )
        for number, question in enumerate(asked)
    ]
