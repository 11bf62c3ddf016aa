"""What the study left open, as generated sources: conversations and code whose parts are chunks.

A plug-in of blocktune: ``dialogue:`` makes conversations with a chunk per turn, ``code:`` small
projects with a chunk per file. Name this file to a command that reads one:

    blocktune data show 'code:?n=4&files=3' --plugin eval/study/probes.py

Source: arXiv:2603.20218, section 6.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import NamedTuple

from blocktune.data.chunking import Message, build_chunker, chunks_of
from blocktune.data.example import RagExample
from blocktune.data.sources.options import GENERATORS, Generator, refuse_rest
from blocktune.parsing import build_config
from blocktune.prompt.format import Chunk

CODE_KINDS = ("constant", "import", "call")
MODULES = (
    "billing",
    "shipping",
    "inventory",
    "pricing",
    "taxes",
    "reports",
    "users",
    "orders",
    "refunds",
    "search",
    "alerts",
    "exports",
    "limits",
    "quotas",
    "rates",
    "backups",
)
NOUNS = ("limit", "rate", "offset", "budget", "delay", "margin", "quota", "level", "size", "score")


@dataclass(frozen=True)
class CodeConfig:
    """What to generate.

    Attributes:
        n: Questions, each over a project of its own.
        files: Files of a project, 2 to 16.
        seed: Another seed gives others.
        kinds: ``constant``: the value stands in the file that is asked about; ``import``: it comes
            from another file; ``call``: a sum of two files' values.

    Raises:
        ValueError: If a value is not accepted.
    """

    n: int = 100
    files: int = 6
    seed: int = 0
    kinds: tuple[str, ...] = CODE_KINDS

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"'n' must be at least 1, got {self.n}")
        if not 2 <= self.files <= len(MODULES):
            raise ValueError(f"'files' must be from 2 to {len(MODULES)}, got {self.files}")
        if not self.kinds or set(self.kinds) - set(CODE_KINDS):
            raise ValueError(
                f"'kinds' must be of {', '.join(CODE_KINDS)}, got {', '.join(self.kinds)}"
            )


def generate_code(config: CodeConfig) -> Iterator[RagExample]:
    """Yields ``config.n`` questions; example ``i`` is the same however many are drawn."""
    for index in range(config.n):
        rng = Random(f"code/{config.seed}/{index}")
        yield _project(rng, config, config.kinds[index % len(config.kinds)], index)


def _project(rng: Random, config: CodeConfig, kind: str, index: int) -> RagExample:
    """Every file has a constant; of two, one imports the other's. Which ones is asked of."""
    modules = rng.sample(MODULES, config.files)
    nouns = {module: rng.choice(NOUNS) for module in modules}
    values = dict(zip(modules, rng.sample(range(10, 100), config.files), strict=True))
    asked, other = rng.sample(modules, 2)
    body, answer = {
        "constant": (_name(nouns[asked]), values[asked]),
        "import": (f"{other}.{_name(nouns[other])}", values[other]),
        "call": (
            f"{_name(nouns[asked])} + {other}.current_{nouns[other]}()",
            values[asked] + values[other],
        ),
    }[kind]
    sources = {}
    for module in modules:
        imported, returned = None, _name(nouns[module])
        if module == asked:
            imported, returned = (None if kind == "constant" else other), body
        elif module != other and rng.random() < 0.5:  # the question's file is not the only importer
            imported = rng.choice([m for m in modules if m not in (module, asked)])
            returned = f"{imported}.{_name(nouns[imported])}"
        sources[module] = _source(nouns[module], values[module], imported, returned)
    needed = (asked,) if kind == "constant" else (asked, other)
    return RagExample(
        question=f"What does {asked}.current_{nouns[asked]}() return? Answer with the number.",
        chunks=tuple(Chunk(source, f"{module}.py") for module, source in sources.items()),
        answers=(str(answer),),
        kind=kind,
        id=f"code-{config.seed}-{index}",
        supporting=tuple(i for i, module in enumerate(sources) if module in needed),
        meta={"scorer": "ruler_any"},
    )


def _source(noun: str, value: int, imported: str | None, returned: str) -> str:
    head = f"import {imported}\n\n" if imported else ""
    return (
        f"{head}{_name(noun)} = {value}\n\n\n"
        f'def current_{noun}():\n    """The {noun} in force."""\n    return {returned}\n'
    )


def _name(noun: str) -> str:
    return noun.upper()


DIALOGUE_KINDS = ("recall", "update", "reference")
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
    kinds: tuple[str, ...] = DIALOGUE_KINDS

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"'n' must be at least 1, got {self.n}")
        if self.turns < 4:
            raise ValueError(f"'turns' must be at least 4, got {self.turns}")
        if not self.kinds or set(self.kinds) - set(DIALOGUE_KINDS):
            raise ValueError(
                f"'kinds' must be of {', '.join(DIALOGUE_KINDS)}, got {', '.join(self.kinds)}"
            )


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


def _code(rest: str, options: dict[str, str], tokenizer) -> Iterator[RagExample]:
    refuse_rest("code", rest)
    return generate_code(build_config(CodeConfig, options, "code:"))


def _dialogues(rest: str, options: dict[str, str], tokenizer) -> Iterator[RagExample]:
    refuse_rest("dialogue", rest)
    return generate_dialogues(build_config(DialogueConfig, options, "dialogue:"))


GENERATORS["code"] = Generator(
    _code, "small Python project, a chunk per file", "code:?n=200&files=6&kinds=import,call"
)
GENERATORS["dialogue"] = Generator(
    _dialogues, "conversation about plans, a chunk per turn", "dialogue:?n=200&turns=8&kinds=update"
)
