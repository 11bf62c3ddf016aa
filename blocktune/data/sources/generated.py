"""Sources that are generated from a seed, with no file and no network; imported when asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.data.example import RagExample
from blocktune.data.sources.options import SourceName, build_config
from blocktune.data.sources.reading import load_tokenizer
from blocktune.data.sources.synthetic import read_worlds

Examples = Iterator[RagExample]
Options = dict[str, str]
Tokenizer = PreTrainedTokenizerBase | None


class Generator(NamedTuple):
    """A source that is generated.

    Attributes:
        read: From what stands after the colon, the options and a tokenizer (or None) to examples.
        becomes: What an example is, in a few words.
        example: A source of this kind.
    """

    read: Callable[[str, Options, Tokenizer], Examples]
    becomes: str
    example: str


def generate(source: SourceName, tokenizer: Tokenizer) -> Examples:
    """Examples of a generated source.

    Raises:
        ValueError: If an option is unknown or a value is not accepted.
    """
    prefix, _, rest = source.name.partition(":")
    return GENERATORS[prefix].read(rest, source.options, tokenizer)


def _worlds(split: str, options: Options, tokenizer: Tokenizer) -> Examples:
    return read_worlds(split, options)


def _ruler(task: str, options: Options, tokenizer: Tokenizer) -> Examples:
    from blocktune.data.ruler import RulerConfig, generate_ruler

    config = build_config(RulerConfig, {**options, "task": task}, f"ruler:{task}")
    return generate_ruler(config, _counter("ruler", config.tokenizer, tokenizer))


def _needle(rest: str, options: Options, tokenizer: Tokenizer) -> Examples:
    from blocktune.data.ruler import NeedleConfig, generate_needles

    _nothing("needle", rest)
    config = build_config(NeedleConfig, options, "needle:")
    return generate_needles(config, _counter("needle", config.tokenizer, tokenizer))


def _dialogue(rest: str, options: Options, tokenizer: Tokenizer) -> Examples:
    from blocktune.data.probes import DialogueConfig, generate_dialogues

    _nothing("dialogue", rest)
    return generate_dialogues(build_config(DialogueConfig, options, "dialogue:"))


def _code(rest: str, options: Options, tokenizer: Tokenizer) -> Examples:
    from blocktune.data.probes import CodeConfig, generate_code

    _nothing("code", rest)
    return generate_code(build_config(CodeConfig, options, "code:"))


def _counter(what: str, name: str | None, tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    if name is not None:
        return load_tokenizer(name)
    if tokenizer is None:
        raise ValueError(f"{what}: lengths are in tokens; say whose: tokenizer=MODEL")
    return tokenizer


def _nothing(what: str, rest: str) -> None:
    if rest:
        raise ValueError(f"'{what}:' is followed by options, '{what}:?n=10'; got '{what}:{rest}'")


GENERATORS: dict[str, Generator] = {
    "worlds": Generator(
        _worlds,
        "multi-hop question over made-up passages",
        "worlds:test?seed=1&n=500&kinds=2-hop",
    ),
    "ruler": Generator(
        _ruler,
        "one of RULER's 13 tasks, its context cut into chunks",
        "ruler:niah_multikey_1?length=4096&n=100&tokenizer=MODEL",
    ),
    "needle": Generator(
        _needle,
        "a needle at every depth of every length",
        "needle:?lengths=1024,4096&depths=0,50,100&n=20&tokenizer=MODEL",
    ),
    "dialogue": Generator(
        _dialogue,
        "conversation about plans, a chunk per turn",
        "dialogue:?n=200&turns=8&kinds=update",
    ),
    "code": Generator(
        _code,
        "small Python project, a chunk per file",
        "code:?n=200&files=6&kinds=import,call",
    ),
}
"""By what stands before the colon."""
