"""Synthetic multi-hop questions in English, over chunks that may depend on other chunks.

Splits share no names. The same configuration gives the same examples.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, combinations, count, islice
from random import Random
from typing import Any, NamedTuple

from blocktune.data.example import RagExample
from blocktune.data.worlds.vocabulary import COMPARED
from blocktune.data.worlds.world import QUESTION_KINDS, Fact, World, WorldConfig, draw_world, refer
from blocktune.prompt import Chunk

MARKER = "Answer: "  # precedes the scored answer in a response that names other values first


def chains(world: World, hops: int) -> list[tuple[Fact, ...]]:
    """All chains in which each fact's value is the subject of the next, without cycles."""
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
    return paths


def candidates(world: World) -> dict[str, list[tuple[Fact, ...]]]:
    """Groups the facts, or chains of facts, that can be asked about, by kind of question."""
    groups: dict[str, list[tuple[Fact, ...]]] = {kind: [] for kind in QUESTION_KINDS}
    for fact in world.facts.values():
        place = world.places[fact.subject.name, fact.relation.name]
        kind = "self-contained" if place.chunk == place.first else "cross-chunk"
        groups[kind].append((fact,))
        # Only if the chunk's words for the subject identify the fact.
        if place.mention not in ("name", "list"):
            words = refer(fact.subject, place.mention)
            subjects = (f.subject for f in world.facts.values() if f.relation == fact.relation)
            if [words == refer(subject, place.mention) for subject in subjects].count(True) == 1:
                groups["referred"].append((fact,))
    dated = [fact for fact in world.facts.values() if fact.relation.name in COMPARED]
    groups |= {"2-hop": chains(world, 2), "3-hop": chains(world, 3)}
    groups["comparison"] = [
        (one, other)
        for one, other in combinations(dated, 2)
        if one.relation == other.relation and one.value != other.value
    ]
    return {kind: facts for kind, facts in groups.items() if facts}


def ask(rng: Random, kind: str, facts: tuple[Fact, ...], world: World) -> RagExample:
    """Writes a question about facts, of one of `QUESTION_KINDS`, with its only correct answer.

    The response is the answer, or the intermediate values (in ``meta`` the ``bridges``), `MARKER`
    and the answer. ``meta`` has each fact's relation, chunk, and how that refers to its subject.
    """
    places = [world.places[fact.subject.name, fact.relation.name] for fact in facts]
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
        answer, values = winner.subject.name, [one.value, other.value]
    elif kind == "referred":
        words = refer(facts[0].subject, places[0].mention)
        text = rng.choice(facts[0].relation.questions).format(s=words)
        answer, values = facts[0].value, []
    else:
        *before, last = facts
        subject = facts[0].subject.name
        for fact in before:
            subject = fact.relation.role.format(s=subject)
        by_role = rng.random() < world.style.roles
        wordings = (last.relation.plain_question,) if by_role else last.relation.questions
        text, answer = rng.choice(wordings).format(s=subject), last.value
        values = meta["bridges"] = [fact.value for fact in before]
    response = f"{', '.join(values)}. {MARKER}{answer}" if values else answer
    supporting = tuple(sorted({i for place in places for i in (place.first, place.chunk)}))
    chunks = tuple(world.chunks)
    return RagExample(text, chunks, (answer,), response, kind, supporting=supporting, meta=meta)


def state(rng: Random, fact: Fact, roles: float) -> tuple[str, str, str]:
    """Writes a fact with the full name: the words before the value, the value, and the rest."""
    relation = fact.relation
    by_role = relation.place or rng.random() < roles
    wording = relation.plain_fact if by_role else rng.choice(relation.facts)
    before, after = wording.format(s=fact.subject.name, o="|").split("|")
    return before, fact.value, after


def generate_examples(config: WorldConfig) -> Iterator[RagExample]:
    """Yields ``config.num_examples`` examples; example ``i`` does not depend on their number."""
    drawn = (_one_world(config, index) for index in count())
    yield from islice(chain.from_iterable(drawn), config.num_examples)


MOST_WORLDS = 5000  # maximum number of worlds drawn to find a question of a kind


class Context(NamedTuple):
    """Chunks, and what is asked and stated about them."""

    chunks: tuple[Chunk, ...]
    questions: tuple[RagExample, ...]  # distinct
    statements: tuple[tuple[str, str, str], ...]  # of all facts, see `state`


def draw_context(rng: Random, config: WorldConfig, num_questions: int) -> Context:
    """Draws a kind, then worlds until one has a question of that kind, which becomes the first.

    Returns fewer than ``num_questions`` if the world has no more. Does not use ``config.seed``.
    """
    wanted = rng.choices(list(config.kinds), list(config.kinds.values()))[0]
    for _ in range(MOST_WORLDS):
        world = draw_world(rng, config)
        pools = candidates(world)
        if wanted in pools:
            break
    else:
        raise ValueError(
            f"no '{wanted}' question in {MOST_WORLDS} worlds; ask for more passages, or leave the "
            "kind out"
        )
    pools = {k: rng.sample(pool, len(pool)) for k, pool in pools.items() if k in config.kinds}
    questions: list[RagExample] = []
    while pools and len(questions) < num_questions:
        weights = [config.kinds[kind] for kind in pools]
        kind = rng.choices(list(pools), weights)[0] if questions else wanted
        questions.append(ask(rng, kind, pools[kind].pop(), world))
        pools = {kind: pool for kind, pool in pools.items() if pool}
    facts = rng.sample(list(world.facts.values()), len(world.facts))
    statements = tuple(state(rng, fact, world.style.roles) for fact in facts)
    return Context(tuple(world.chunks), tuple(questions), statements)


def _one_world(config: WorldConfig, index: int) -> list[RagExample]:
    rng = Random(f"{config.split}/{config.seed}/{index}")
    context = draw_context(rng, config, max(config.questions_per_world, config.turns))
    questions = context.questions
    if config.turns > 1:
        first, *later = questions
        followups = tuple((question.question, question.response) for question in later)
        # Augmentation must keep the evidence of every turn.
        evidence = sorted(set(chain(*(question.supporting for question in questions))))
        questions = (replace(first, supporting=tuple(evidence), followups=followups),)
    name = f"{config.split}-{config.seed}-{index}"
    return [replace(question, id=f"{name}-{i}") for i, question in enumerate(questions)]
