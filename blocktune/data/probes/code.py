"""A small Python project: every file is a chunk, the question asks what a call returns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from random import Random

from blocktune.data.example import RagExample
from blocktune.prompt.format import Chunk

KINDS = ("constant", "import", "call")
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
    kinds: tuple[str, ...] = KINDS

    def __post_init__(self):
        if self.n < 1:
            raise ValueError(f"'n' must be at least 1, got {self.n}")
        if not 2 <= self.files <= len(MODULES):
            raise ValueError(f"'files' must be from 2 to {len(MODULES)}, got {self.files}")
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ValueError(f"'kinds' must be of {', '.join(KINDS)}, got {', '.join(self.kinds)}")


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
