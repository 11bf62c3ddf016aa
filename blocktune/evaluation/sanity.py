"""Before a suite runs: is the prompt one that lets full prefill show what it can?

A doubled BOS or an assistant turn that was never opened lowers all methods, the oracle most,
and makes reuse look free. These checks do not trust the function that builds prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocktune.data import RagExample
from blocktune.prompt import PromptFormat, make_pieces


def check_prompts(engines: Mapping[str, Any], example: RagExample) -> None:
    """Refuses to go on unless all engines build one and the same sound prompt, tags aside.

    Args:
        engines: Name -> engine, with its ``tokenizer`` and prompt ``format``.
        example: Any question of the suite.

    Raises:
        ValueError: If BOS does not open the prompt exactly once where the tokenizer or its
            template wants it, the assistant's turn is not open, or prompts differ.
    """
    for engine in engines.values():
        _check(engine.tokenizer, _ids(engine.tokenizer, engine.format, example))
    prompts = {
        name: _ids(engine.tokenizer, engine.format.untagged, example)
        for name, engine in engines.items()
    }
    first, *others = prompts
    for name in others:
        if prompts[name] != prompts[first]:
            raise ValueError(
                f"'{name}' and '{first}' build different prompts of the same question, so their "
                f"scores cannot be compared ({_difference(engines[name], engines[first])}); say it "
                f"in the task's prompt for both, or train with it"
            )


def _ids(tokenizer, fmt: PromptFormat, example: RagExample) -> tuple[int, ...]:
    pieces = make_pieces(tokenizer, fmt, example.chunks, example.question)
    return (*pieces.prefix, *(i for chunk in pieces.chunks for i in chunk), *pieces.query)


def _difference(engine, other) -> str:
    """Fields of the wording that differ, else the tokenizers do."""
    one, two = (e.format.untagged.to_dict() for e in (engine, other))
    fields = [key for key in one if one[key] != two[key]]
    return f"their wordings differ in {', '.join(fields)}" if fields else "their tokenizers differ"


def _check(tokenizer, ids: tuple[int, ...]) -> None:
    _check_bos(tokenizer, ids)
    if tokenizer.chat_template is not None:
        _check_open_turn(tokenizer, ids)


def _check_bos(tokenizer, ids: tuple[int, ...]) -> None:
    bos = tokenizer.bos_token_id
    if bos is None:
        return
    wanted = 1  # plain text opens with it
    if tokenizer.chat_template is not None:
        own = bos in tokenizer("a")["input_ids"]
        wanted = max(own, _render(tokenizer, opened=True).count(tokenizer.bos_token))
    if ids.count(bos) != wanted or (wanted and ids[0] != bos):
        raise ValueError(
            f"the prompt should open with {tokenizer.bos_token!r} and hold it {wanted} times, as "
            f"the model was trained; it opens with {tokenizer.decode(ids[:1])!r} and holds it "
            f"{ids.count(bos)} times; look at it with `blocktune answer --show-prompt`"
        )


def _check_open_turn(tokenizer, ids: tuple[int, ...]) -> None:
    opened, closed = (_squeeze(_render(tokenizer, opened=o)) for o in (True, False))
    opening = opened.removeprefix(closed) or opened.rpartition("?")[2]
    ending = _squeeze(tokenizer.decode(ids[-64:]))
    # Contained, not at the very end: a template may add an empty block of thoughts after it.
    if opening not in ending:
        raise ValueError(
            f"the prompt must open the assistant's turn with {opening!r}, it ends with "
            f"{ending[-40:]!r}; look at it with `blocktune answer --show-prompt`"
        )


def _render(tokenizer, *, opened: bool) -> str:
    messages = [{"role": "user", "content": "Where?"}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)


def _squeeze(text: str) -> str:
    """Without white space, which some tokenizers do not give back as it was."""
    return "".join(text.split())
