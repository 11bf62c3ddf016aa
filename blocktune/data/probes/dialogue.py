"""Conversations about plans: every turn is a chunk, the question asks what holds at the end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from blocktune.data.chunking import Message, build_chunker, chunks_of
from blocktune.data.example import RagExample

KINDS = ("recall", "update", "reference")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
PLACES = ("the library", "the harbour", "room 12", "the old mill", "the station", "the bakery")
EVENTS = (
    "piano lesson",
    "dentist appointment",
    "budget meeting",
    "chess game",
    "choir practice",
    "parents' evening",
    "boat trip",
    "job interview",
    "garden party",
    "fire drill",
    "book club",
    "swimming class",
)
SMALL_TALK = (
    ("How do I get wax out of a tablecloth?", "Let it harden, then scrape it off."),
    ("Name a river in France.", "The Loire."),
    ("Is a tomato a fruit?", "Botanically, yes."),
    ("What rhymes with orange?", "Nothing does quite."),
    ("How long do eggs boil?", "Eight minutes for firm ones."),
    ("Tell me something about bees.", "They tell each other where food is by dancing."),
)


class Turn(NamedTuple):
    """What the user said and what was answered."""

    said: str
    answered: str


@dataclass(frozen=True)
class DialogueConfig:
    """What to generate.

    Attributes:
        n: Conversations.
        turns: Turns before the question, at least 4.
        seed: Another seed gives others.
        kinds: ``recall``: said once; ``update``: said, and changed in a later turn; ``reference``:
            changed in a turn that says only "the one I named first" (the turn before is needed to
            know which).

    Raises:
        ValueError: If a value is not accepted.
    """

    n: int = 100
    turns: int = 8
    seed: int = 0
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"'n' must be at least 1, got {self.n}")
        if self.turns < 4:
            raise ValueError(f"'turns' must be at least 4, got {self.turns}")
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ValueError(f"'kinds' must be of {', '.join(KINDS)}, got {', '.join(self.kinds)}")


def generate_dialogues(config: DialogueConfig) -> Iterator[RagExample]:
    """Yields ``config.n`` conversations; example ``i`` is the same however many are drawn."""
    for index in range(config.n):
        rng = Random(f"dialogue/{config.seed}/{index}")
        yield _dialogue(rng, config, config.kinds[index % len(config.kinds)], index)


def _dialogue(rng: Random, config: DialogueConfig, kind: str, index: int) -> RagExample:
    """Plans first, the change (if any) somewhere after the plan it is about, small talk between."""
    event, other = rng.sample(EVENTS, 2)
    day, new_day, other_day = rng.sample(DAYS, 3)
    place, other_place = rng.sample(PLACES, 2)
    plans = [_plan(event, day, place), _plan(other, other_day, other_place)]
    talk = [Turn(*pair) for pair in rng.choices(SMALL_TALK, k=config.turns)]
    opening = Turn(
        f"I have two things to plan, the {event} and then the {other}.", "Tell me when and where."
    )
    moved = Turn(f"The {event} moves to {new_day}.", "Noted.")
    first_moved = Turn(f"The one I named first moves to {new_day}.", "Noted.")
    turns = {
        "recall": rng.sample(plans, 2),
        "update": [*rng.sample(plans, 2), moved],
        "reference": [opening, *plans, first_moved],
    }[kind]
    places = sorted(rng.sample(range(config.turns), len(turns)))
    held = dict(zip(places, turns, strict=True))
    said = [held.get(i) or talk[i] for i in range(config.turns)]
    messages = [
        message
        for turn in said
        for message in (Message("user", turn.said), Message("assistant", turn.answered))
    ]
    needed = (f"The {event}", f"I have two things to plan, the {event}", "The one I named first")
    return RagExample(
        question=f"On which day is the {event}?",
        chunks=chunks_of(build_chunker("message").split_messages(messages)),
        answers=(day if kind == "recall" else new_day,),
        kind=kind,
        id=f"dialogue-{config.seed}-{index}",
        supporting=tuple(i for i in places if held[i].said.startswith(needed)),
        meta={"scorer": "ruler_any"},
    )


def _plan(event: str, day: str, place: str) -> Turn:
    return Turn(f"The {event} is on {day}, at {place}.", "I will remember that.")
