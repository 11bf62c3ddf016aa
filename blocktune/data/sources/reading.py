"""How the records of a file or a Hub data set are read: the options of a source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from blocktune.data.chunking import Chunker, build_chunker
from blocktune.data.sources.options import SourceName

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
