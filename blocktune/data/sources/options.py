"""Source names, ``NAME?key=value&key=value``: their options, and the generators."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple
from urllib.parse import parse_qsl, quote

from transformers import PreTrainedTokenizerBase

from blocktune import plugins
from blocktune.data.chunking import CHUNKERS, Chunker
from blocktune.data.example import RagExample
from blocktune.models.load import read_tokenizer
from blocktune.parsing import build_config, refuse_doubles


class SourceName(NamedTuple):
    """A parsed source."""

    text: str  # the whole string
    name: str  # the part before ``?``
    options: dict[str, str]  # the part after ``?``


def parse_source(source: str) -> SourceName:
    """Parses a source. An existing file whose name contains a question mark has no options."""
    source = os.path.expanduser(source)
    if os.path.isfile(source):  # unlike `Path.is_file`, takes names of any length
        return SourceName(source, source, {})
    name, _, query = source.partition("?")
    pairs = parse_qsl(query.replace("+", "%2B"), keep_blank_values=True)  # a plus is no space
    if not all(map(all, pairs)):
        raise ValueError(f"'{source}' has options that are not key=value&key=value")
    refuse_doubles(f"'{source}': option", [key for key, _ in pairs], "give it once")
    return SourceName(source, name, dict(pairs))


def with_fields(source: str, mapping: str | None) -> str:
    """Appends ``--fields question=input,chunks=context`` to a source as an option."""
    if mapping is None:
        return source
    text = ",".join(pair.replace("=", ":", 1) for pair in mapping.split(","))
    _ = _mapping(text)  # validates it
    return f"{source}{'&' if '?' in source else '?'}fields={quote(text, safe=':,')}"


def _mapping(text: str) -> dict[str, str]:
    """Parses ``question:input,chunks:context`` to new name -> old name."""
    pairs = [tuple(map(str.strip, pair.partition(":")[::2])) for pair in text.split(",")]
    if not all(new and old for new, old in pairs) or len(dict(pairs)) < len(pairs):
        raise ValueError(f"'fields' must be NEW:OLD,NEW:OLD,..., each NEW once; got '{text}'")
    return dict(pairs)


@dataclass(frozen=True)
class Reading:
    """Options of a source; all others belong to the chunker."""

    split: str | None = None  # of a Hub data set
    shape: str | None = None  # record shape (``as=``); None: detected by the fields
    fields: Mapping[str, str] | None = None  # fields to rename: new name -> old name
    chunker: Chunker | None = None  # splits records that have no chunks
    tokenizer: PreTrainedTokenizerBase | None = None  # counts tokens for the chunker
    shots: int | None = None  # solved examples given as chunks, for ``few-shot``; None: 5
    seed: int | None = None  # of the choice of shots; None: 0
    shuffle: int | None = None  # seed of a random order, before the limit; None keeps the order

    def __post_init__(self):
        if self.shots is not None and self.shots < 1:
            raise ValueError(f"'shots' must be at least 1, got {self.shots}")


OPTIONS = {"as" if f.name == "shape" else f.name: f.name for f in fields(Reading)}
"""Options of a source -> fields of `Reading`."""


def read_options(
    source: SourceName,
    *,
    split: str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    chunker: Chunker | None = None,
) -> Reading:
    """Reads a source's options; arguments override them. Raises ValueError, naming the source."""
    own = {key: text for key, text in source.options.items() if key in OPTIONS}
    options = {key: text for key, text in source.options.items() if key not in OPTIONS}
    if options and "chunker" not in own:
        known = ", ".join(OPTIONS)
        raise ValueError(
            f"unknown option '{min(options)}' of '{source.text}'; known: {known}, and a chunker's"
        )
    given = {"chunker": chunker, "tokenizer": tokenizer}
    try:
        if name := own.pop("chunker", None):
            built = build_config(CHUNKERS.find(name), options, f"chunker={name}")
            given["chunker"] = chunker or built
        if name := own.pop("tokenizer", None):
            given["tokenizer"] = read_tokenizer(name)
        given["fields"] = _mapping(own.pop("fields")) if "fields" in own else None
    except ValueError as error:
        raise ValueError(f"'{source.text}': {error}") from None
    own |= {"split": split} if split else {}
    return build_config(Reading, own, f"'{source.text}'", OPTIONS, **given)


Tokenizer = PreTrainedTokenizerBase | None


class Generator(NamedTuple):
    """A source that is generated from a seed, without files or network."""

    # arguments: the text after the colon, the options, and a tokenizer or None
    read: Callable[[str, dict[str, str], Tokenizer], Iterator[RagExample]]
    becomes: str  # what it generates, in words
    example: str  # a complete source


def generators() -> dict[str, Generator]:
    """`GENERATORS`, after all plug-ins are loaded."""
    plugins.load_all()
    return GENERATORS


def generate(source: SourceName, tokenizer: Tokenizer) -> Iterator[RagExample] | None:
    """Generates examples; None if no generator has the prefix. Loads plug-ins if necessary."""
    prefix, colon, rest = source.name.partition(":")
    if not colon or (prefix not in GENERATORS and prefix not in generators()):
        return None
    return GENERATORS[prefix].read(rest, source.options, tokenizer)


def refuse_rest(what: str, rest: str) -> None:
    """Raises ValueError for text after the colon of a generator that has only options."""
    if rest:
        raise ValueError(f"'{what}:' is followed by options, '{what}:?n=10'; got '{what}:{rest}'")


def _worlds(split: str, options: Mapping[str, str], tokenizer: Tokenizer) -> Iterator[RagExample]:
    from blocktune.data.worlds import WorldConfig, generate_examples

    names = {"n": "num_examples", "passages": "num_passages"}
    given = {"split": split, "plain": False}
    return generate_examples(build_config(WorldConfig, options, f"worlds:{split}", names, **given))


def _needle(rest: str, options: Mapping[str, str], tokenizer: Tokenizer) -> Iterator[RagExample]:
    from blocktune.data.needle import NeedleConfig, generate_needles

    refuse_rest("needle", rest)
    config = build_config(NeedleConfig, options, "needle:")
    counter = read_tokenizer(config.tokenizer) if config.tokenizer else tokenizer
    if counter is None:
        raise ValueError("needle: lengths are in tokens; name a tokenizer: tokenizer=MODEL")
    return generate_needles(config, counter)


_NEEDLE = "needle:?lengths=1024,4096&depths=0,50,100&n=20&tokenizer=MODEL"
_WORLDS = "worlds:test?seed=1&n=500&kinds=2-hop"
GENERATORS: dict[str, Generator] = {
    "worlds": Generator(_worlds, "multi-hop question over made-up passages", _WORLDS),
    "needle": Generator(_needle, "needle in a haystack, by length and depth", _NEEDLE),
}
"""Generators by the prefix before the colon. Plug-ins add their own."""
