"""Every key of a run in one list: blocktune's own first, then what TRL and transformers add."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import MISSING, Field, fields

from rich.console import Console
from rich.table import Table
from rich.text import Text
from trl import ModelConfig

from blocktune.training.config import (
    BatchOptions,
    BlockSFTConfig,
    DataArgs,
    LayoutOptions,
    ObjectiveOptions,
)

GROUPS = {
    "Data and wording": DataArgs,
    "Layout": LayoutOptions,
    "Objective": ObjectiveOptions,
    "Batches": BatchOptions,
    "The run": BlockSFTConfig,
    "Model, LoRA and quantisation, by TRL": ModelConfig,
}
"""Title -> the class that declares the keys; all others come from transformers' Trainer."""


def print_options(console: Console | None = None) -> None:
    """Prints every key with its default and what it means, a table for each group."""
    console = console or Console()
    shown: set[str] = set()
    for title, holder in GROUPS.items():
        own = [field for field in fields(holder) if field.name in holder.__annotations__]
        shown.update(field.name for field in own)
        _print(console, title, own)
    rest = [field for field in fields(BlockSFTConfig) if field.init and field.name not in shown]
    _print(console, "Training, by TRL and transformers", rest)


def _print(console: Console, title: str, group: Iterable[Field]) -> None:
    table = Table("key", "default", "meaning", title=title, title_justify="left", box=None)
    for field in group:
        table.add_row(Text(field.name, "cyan"), Text(_default(field)), Text(_meaning(field)))
    console.print(table)
    console.print()


def _default(field: Field) -> str:
    made = field.default_factory is not MISSING
    value = field.default_factory() if made else field.default
    return repr(value) if isinstance(value, str) else str(getattr(value, "value", value))


def _meaning(field: Field) -> str:
    """The first sentence: those of transformers go on for paragraphs."""
    text = " ".join(str(field.metadata.get("help", "")).split())
    return re.split(r"(?<=\w\w\w)\.\s", text, maxsplit=1)[0].removesuffix(".")
