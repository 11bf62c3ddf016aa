"""Sources that are generated from a seed, with no file and no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.data.example import RagExample
from blocktune.data.sources.options import SourceName, build_config, load_tokenizer

_KEYS = {
    "seed": "a whole number",
    "n": "the number of questions",
    "kinds": "names with commas between",
    "passages": "a number of chunks or LOW-HIGH",
    "questions_per_world": "a whole number",
    "aliased": "a share from 0 to 1",
    "crowded": "1 or 0: whether any number of documents go on in other chunks",
    "turns": "the number of questions asked in turn of one context",
}


def read_worlds(split: str, options: Mapping[str, str]) -> Iterator[RagExample]:
    """Generates the examples of a ``worlds:`` source.

    Args:
        split: ``train``, ``dev`` or ``test``.
        options: Of the query string; see the error for the keys.

    Raises:
        ValueError: If a key is unknown or a value is not accepted.
    """
    from blocktune.data.worlds import WorldConfig, generate_examples

    if unknown := options.keys() - _KEYS.keys():
        known = ", ".join(f"{key} ({what})" for key, what in _KEYS.items())
        raise ValueError(f"unknown option '{min(unknown)}' of 'worlds:{split}'; known: {known}")
    values = {}
    if "seed" in options:
        values["seed"] = _number(options, "seed")
    if "n" in options:
        values["num_examples"] = _number(options, "n")
    if "questions_per_world" in options:
        values["questions_per_world"] = _number(options, "questions_per_world")
    if "turns" in options:
        values["turns"] = _number(options, "turns")
    if "aliased" in options:
        values["aliased"] = _number(options, "aliased", float)
    if "crowded" in options:
        values["crowded"] = bool(_number(options, "crowded"))
    if "kinds" in options:
        values["kinds"] = dict.fromkeys(options["kinds"].split(","), 1.0)
    if "passages" in options:
        values["num_passages"] = _range(options["passages"])
    return generate_examples(WorldConfig(split=split, **values))


def _number(options: Mapping[str, str], key: str, number: type = int) -> int | float:
    try:
        return number(options[key])
    except ValueError:
        raise ValueError(f"worlds: '{key}' must be {_KEYS[key]}, got '{options[key]}'") from None


def _range(text: str) -> int | tuple[int, int]:
    low, dash, high = text.partition("-")
    try:
        return (int(low), int(high)) if dash else int(low)
    except ValueError:
        raise ValueError(f"worlds: 'passages' must be {_KEYS['passages']}, got '{text}'") from None


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
