"""The questions that a world can answer, by kind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import combinations
from random import Random
from typing import Any

from blocktune.data.worlds.vocabulary import COMPARED
from blocktune.data.worlds.world import Fact, Passages, Place, World, refer

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
        text, answer, said = _compare(rng, *facts)
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


def _compare(rng: Random, one: Fact, other: Fact) -> tuple[str, str, list[str]]:
    if rng.random() < 0.5:
        one, other = other, one
    later = rng.random() < 0.5
    names = {"a": one.subject.name, "b": other.subject.name}
    text = COMPARED[one.relation.name].format(when="later" if later else "earlier", **names)
    winner = (max if later else min)(one, other, key=lambda fact: int(fact.value))
    return text, winner.subject.name, [one.value, other.value]
