"""Tasks: what is asked, how it is worded, cut, decoded and scored; versioned YAML files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

from blocktune.evaluation.metrics import METRICS, Metric, require_metrics
from blocktune.parsing import load_yaml, mapping, read
from blocktune.prompt import PromptFormat

HINT = "see eval/tasks/ for examples"
FILE_KEYS = ("task", "variant")  # keys of a suite's entry that are not the task's own


@dataclass(frozen=True)
class TaskSpec:
    """One set of questions and how they are asked and scored."""

    name: str  # its name in results
    source: str  # what `load_examples` reads: a path, ``musique``, ``worlds:test?n=300``
    version: int = 1  # of the task file; raised whenever a change moves scores
    limit: int | None = None  # use only the first ones; None uses all
    # wording, keys of `PromptFormat`; what it leaves out is each model's own, such as the tag of a
    # mode that an adapter was trained with
    prompt: Mapping[str, Any] | None = None
    # how the source cuts: a chunker and its parameters, ``{chunker: fixed, size: 512}``, or a
    # generator's ``{chunk: 128}``; empty leaves it to the source
    chunking: Mapping[str, Any] = field(default_factory=dict)
    answer_marker: str | None = None  # the text after it is scored; None scores the whole output
    stop: tuple[str, ...] = ()  # the output ends before the first of these texts
    max_new_tokens: int = 32  # longest answer, in tokens
    metric: str = "em"  # its headline score, a name of `METRICS`
    metrics: tuple[str, ...] = ()  # further scores
    by_kind: bool = True  # whether results are also given for each kind of question
    cite: str = ""  # where data and wording come from

    def __post_init__(self):
        for name in ("limit", "max_new_tokens", "version"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        require_metrics((self.metric, *self.metrics))
        self.worded(PromptFormat())  # a wrong key is refused here, not in the middle of a run

    @property
    def headline(self) -> Metric:
        """The metric that tables and pictures show."""
        return METRICS[self.metric]

    def worded(self, own: PromptFormat) -> PromptFormat:
        """How a model is asked whose own wording is ``own``."""
        return PromptFormat.from_dict(own.to_dict() | dict(self.prompt or {}))

    def full_source(self) -> str:
        """The source with the chunking among its options."""
        name, _, options = self.source.partition("?")
        if not self.chunking:
            return self.source
        merged = dict(parse_qsl(options)) | dict(self.chunking)
        return f"{name}?{urlencode(merged, safe='/:,')}"

    def cut(self, text: str) -> str:
        """The part of an output that is scored by metrics with rules of their own."""
        for stop in self.stop:
            text = text.partition(stop)[0]
        return text.rpartition(self.answer_marker)[2] if self.answer_marker else text

    def decides(self) -> dict[str, Any]:
        """All that decides a row, as JSON; where questions come from and how many does not."""
        ignored = ("source", "limit", "by_kind", "cite", "chunking")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ignored}


def parse_task(record: Any, where: str = "task") -> TaskSpec:
    """Builds a task from an entry of a suite; ``where`` opens every ValueError.

    The entry holds the task's own keys; or ``task`` (a file), ``variant`` (one of its variants) and
    keys that replace the file's.
    """
    record = dict(mapping(record, where))
    path, variant = (record.pop(key, None) for key in FILE_KEYS)
    if path is None:
        if variant is not None:
            raise ValueError(f"{where}: 'variant' needs 'task', the file that has the variants")
        return read(TaskSpec, record, where)
    return read(TaskSpec, {**load_task(path, variant), **record}, where)


def load_task(path: str | Path, variant: str | None = None) -> dict[str, Any]:
    """Keys of a task file, with those of one of its variants over them.

    Besides the keys of `TaskSpec` a file may hold ``variants``: name -> keys; results of a variant
    are named ``NAME-VARIANT``. Raises ValueError if it is not YAML or has no such variant.
    """
    values = dict(mapping(load_yaml(path, "task", HINT), str(path)))
    variants = mapping(values.pop("variants", {}), f"{path}: variants")
    if variant is None:
        return values
    if variant not in variants:
        known = ", ".join(variants) or "none"
        raise ValueError(f"{path}: unknown variant '{variant}'; it has: {known}")
    changed = {"name": f"{values.get('name')}-{variant}", **mapping(variants[variant], str(path))}
    return values | changed
