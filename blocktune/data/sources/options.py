"""Sources as one string, ``NAME?key=value&key=value``, and how their records are read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, TypeVar
from urllib.parse import parse_qsl

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from blocktune.data.chunking import Chunker, build_chunker

Config = TypeVar("Config")


class SourceName(NamedTuple):
    """A source taken apart: what stands before ``?``, and the options after it."""

    text: str
    name: str
    options: dict[str, str]


def parse_source(source: str) -> SourceName:
    """Takes a source apart.

    Raises:
        ValueError: If the options are not ``key=value`` pairs, or one stands twice.
    """
    name, _, query = source.partition("?")
    try:
        pairs = parse_qsl(query, strict_parsing=True) if query else []
    except ValueError:
        raise ValueError(f"'{source}' has a query that is not key=value&key=value") from None
    options = dict(pairs)
    if len(options) < len(pairs):
        raise ValueError(f"'{source}' has an option twice; give each once")
    return SourceName(source, name, options)


def build_config(cls: type[Config], options: Mapping[str, str], where: str) -> Config:
    """Builds a dataclass from options, each read as its field's type says.

    Args:
        cls: A dataclass whose fields are ``int``, ``float``, ``str``, ``str | None`` or tuples of
            ``int`` or ``float``, written with commas.
        options: By field.
        where: Opens every error.

    Raises:
        ValueError: If an option is unknown or its value cannot be read.
    """
    known = {f.name: f.type for f in fields(cls)}
    if unknown := options.keys() - known.keys():
        names = ", ".join(known)
        raise ValueError(f"unknown option '{min(unknown)}' of '{where}'; known: {names}")
    values = {key: _read(text, known[key], f"{where}: '{key}'") for key, text in options.items()}
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _read(text: str, kind: str, where: str) -> Any:
    read, wanted = _READERS[kind]
    try:
        return read(text)
    except ValueError:
        raise ValueError(f"{where} must be {wanted}, got '{text}'") from None


def _several(read: Callable[[str], Any]) -> Callable[[str], tuple]:
    return lambda text: tuple(read(part) for part in text.split(","))


_READERS: dict[str, tuple[Callable[[str], Any], str]] = {
    "int": (int, "a whole number"),
    "int | None": (int, "a whole number"),
    "float": (float, "a number"),
    "str": (str, "text"),
    "str | None": (str, "text"),
    "tuple[int, ...]": (_several(int), "whole numbers with commas between"),
    "tuple[float, ...]": (_several(float), "numbers with commas between"),
    "tuple[str, ...]": (_several(str), "names with commas between"),
}


KNOWN = ("split", "as", "chunker", "tokenizer", "shots", "shots_from", "seed", "shuffle")

WHOLE = ("shots", "seed", "shuffle")


@dataclass(frozen=True)
class Reading:
    """What the options after ``?`` say; whatever else stands there is the chunker's.

    Attributes:
        split: Of a Hub data set.
        shape: Record shape (``as=``), or None to tell it by the fields.
        chunker: What cuts records that have no chunks of their own.
        tokenizer: Counts tokens for the chunker.
        shots: Solved examples given as chunks, for the shape ``few-shot``; None gives 5.
        shots_from: Split that they are drawn from; None takes the one that is read.
        seed: Chooses them; None is 0.
        shuffle: Seed of an order to read in, so that a limit takes of everything: MuSiQue's files
            are sorted by hops. None keeps the source's.
    """

    split: str | None = None
    shape: str | None = None
    chunker: Chunker | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    shots: int | None = None
    shots_from: str | None = None
    seed: int | None = None
    shuffle: int | None = None

    def __post_init__(self):
        if self.shots is not None and self.shots < 1:
            raise ValueError(f"'shots' must be at least 1, got {self.shots}")


def read_options(
    source: SourceName,
    *,
    split: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunker: Chunker | None = None,
) -> Reading:
    """Reads a source's options; what is passed here wins.

    Raises:
        ValueError: If an option is unknown or its value cannot be read; names the source.
    """
    options = dict(source.options)
    own = {key: options.pop(key) for key in KNOWN if key in options}
    if options and "chunker" not in own:
        known = ", ".join(KNOWN)
        raise ValueError(
            f"unknown option '{min(options)}' of '{source.text}'; known: {known}, and a chunker's"
        )
    try:
        if chunker is None and "chunker" in own:
            chunker = build_chunker(own["chunker"], **{k: _value(v) for k, v in options.items()})
        return Reading(
            split=split or own.get("split"),
            shape=own.get("as"),
            shots_from=own.get("shots_from"),
            chunker=chunker,
            tokenizer=load_tokenizer(own["tokenizer"]) if "tokenizer" in own else tokenizer,
            **{key: _whole(key, own[key]) for key in WHOLE if key in own},
        )
    except ValueError as error:
        raise ValueError(f"'{source.text}': {error}") from None


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Loads a tokenizer from a folder or the Hub.

    Raises:
        ValueError: If there is none of that name.
    """
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"cannot load a tokenizer from '{name}': {reason}") from None


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _whole(key: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"'{key}' must be a whole number, got '{text}'") from None
