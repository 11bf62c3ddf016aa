"""Suites: which model answers which questions by which methods, as strict YAML."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

_WANTED = {  # annotation of a field below -> what YAML must hold; others are read before
    "str": (str, "text"),
    "str | None": (str | None, "text or null"),
    "int": (int, "a whole number"),
    "int | None": (int | None, "a whole number or null"),
    "bool": (bool, "true or false"),
    "Mapping[str, Any]": (Mapping, "a mapping"),
}


@dataclass(frozen=True)
class MethodSpec:
    """One row of the table: a method, its parameters, and the weights it runs on.

    Attributes:
        name: A registered method.
        adapter: Folder of the adapter it runs with; None runs the base.
        label: Its name in results; ``name`` unless given.
        params: Fields of the method that differ from their defaults.
    """

    name: str
    adapter: str | None = None
    label: str = ""
    params: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if not self.label:
            object.__setattr__(self, "label", self.name)
        if "/" in self.label or self.label.startswith("."):
            raise ValueError(f"label must name a file, got '{self.label}'; leave out slashes")


@dataclass(frozen=True)
class TaskSpec:
    """One set of questions and how they are decoded and scored.

    Attributes:
        name: Its name in results.
        source: What `load_examples` reads: a path, ``hf:NAME``, ``worlds:test?n=300``.
        limit: Use only the first ones; None uses all.
        answer_marker: The text after it is scored; None scores the whole output.
        max_new_tokens: Longest answer, in tokens.
        by_kind: Whether results are also given for each kind of question.
    """

    name: str
    source: str
    limit: int | None = None
    answer_marker: str | None = None
    max_new_tokens: int = 32
    by_kind: bool = True

    def __post_init__(self):
        for name in ("limit", "max_new_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")


@dataclass(frozen=True)
class TtftSpec:
    """How time to first token is measured.

    Attributes:
        num: Prompts of the first task; 0 measures none.
        chunks: Fill each prompt up to so many chunks with those of the questions that follow it;
            None leaves prompts as they are. Short prompts measure overhead, not attention.
    """

    num: int = 20
    chunks: int | None = None

    def __post_init__(self):
        if self.num < 0:
            raise ValueError(f"num must not be negative, got {self.num}")
        if self.chunks is not None and self.chunks < 1:
            raise ValueError(f"chunks must be at least 1, got {self.chunks}")


@dataclass(frozen=True)
class Suite:
    """A whole comparison; see ``eval/suites/`` for examples.

    Attributes:
        model: Path or hub name of the base model.
        methods: What is compared, in the order of the table.
        tasks: What is asked.
        dtype: Of weights and caches; ``auto`` takes the checkpoint's.
        device: Where to run; None takes a GPU when there is one.
        seed: Of the bootstrap, and recorded beside the results.
        batch_size: Prompts answered at a time; timing always runs one.
        ttft: How time to first token is measured.
    """

    model: str
    methods: tuple[MethodSpec, ...]
    tasks: tuple[TaskSpec, ...]
    dtype: str = "auto"
    device: str | None = None
    seed: int = 0
    batch_size: int = 16
    ttft: TtftSpec = TtftSpec()

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        _refuse_doubles("method label", [m.label for m in self.methods], "give one a 'label'")
        _refuse_doubles("task name", [t.name for t in self.tasks], "rename one")


def load_suite(path: str | Path) -> Suite:
    """Reads a suite; relative paths in it start from the current directory.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: In one line: the file, the place in it, what was wanted and what came.
    """
    try:
        record = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"no suite at '{path}'; see eval/suites/ for examples") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML ({' '.join(str(error).split())})") from None
    return parse_suite(record, str(path))


def parse_suite(record: Any, where: str = "suite") -> Suite:
    """Builds a suite from decoded YAML; ``where`` opens every error.

    Raises:
        ValueError: If a key is unknown or missing, or a value is not of its type.
    """
    values = dict(_mapping(record, where))
    for name, spec in (("methods", MethodSpec), ("tasks", TaskSpec)):
        if name in values:
            values[name] = _read_list(spec, values[name], f"{where}: {name}")
    if "ttft" in values:
        values["ttft"] = _read(TtftSpec, values["ttft"], f"{where}: ttft")
    return _read(Suite, values, where)


def _read_list(spec: type, entries: Any, where: str) -> tuple:
    if not isinstance(entries, list) or not entries:
        raise ValueError(f"{where}: must be a list with at least one entry, got {entries!r:.60}")
    named = [{"name": entry} if isinstance(entry, str) else entry for entry in entries]
    return tuple(_read(spec, entry, f"{where}[{i}]") for i, entry in enumerate(named))


def _read(spec: type, record: Any, where: str) -> Any:
    record, known = _mapping(record, where), {f.name: f for f in fields(spec)}
    for key, value in record.items():
        if key not in known:
            raise ValueError(f"{where}: unknown key '{key}'; known: {', '.join(known)}")
        accepted, wanted = _WANTED.get(known[key].type, (object, "given"))
        if not isinstance(value, accepted) or (accepted is not bool and isinstance(value, bool)):
            raise ValueError(f"{where}: '{key}' must be {wanted}, got {value!r:.60}")
    needed = [f.name for f in fields(spec) if f.default is f.default_factory is MISSING]
    if missing := [name for name in needed if name not in record]:
        raise ValueError(f"{where}: '{missing[0]}' is missing; known: {', '.join(known)}")
    try:
        return spec(**record)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _mapping(record: Any, where: str) -> Mapping:
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: must be a mapping of keys to values, got {record!r:.60}")
    return record


def _refuse_doubles(what: str, names: list[str], fix: str) -> None:
    name, count = Counter(names).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{what} '{name}' stands {count} times; {fix}")
