"""Before a suite runs: is the prompt one that lets full prefill show what it can?

A doubled BOS or an assistant turn that was never opened lowers all methods, the oracle most,
and makes reuse look free. These checks do not trust the function that builds prompts.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from blocktune.data import RagExample
from blocktune.prompt import make_pieces


def check_prompts(engines: Mapping[str, Any], example: RagExample) -> None:
    """Refuses to go on unless all engines build one and the same sound prompt.

    Args:
        engines: Name -> engine, with its ``tokenizer`` and prompt ``format``.
        example: Any question of the suite.

    Raises:
        ValueError: If BOS does not open the prompt exactly once where the tokenizer or its
            template wants it, the assistant's turn is not open, or prompts differ.
    """
    prompts = {name: _checked_prompt(engine, example) for name, engine in engines.items()}
    first, *others = prompts
    for name in others:
        if prompts[name] != prompts[first]:
            raise ValueError(
                f"'{name}' and '{first}' build different prompts of the same question, so their "
                f"scores cannot be compared; train and serve both with one prompt format"
            )


def _checked_prompt(engine, example: RagExample) -> tuple[int, ...]:
    tokenizer = engine.tokenizer
    pieces = make_pieces(tokenizer, engine.format, example.chunks, example.question)
    ids = (*pieces.prefix, *(i for chunk in pieces.chunks for i in chunk), *pieces.query)
    _check_bos(tokenizer, ids)
    if tokenizer.chat_template is not None:
        _check_open_turn(tokenizer, ids)
    return ids


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
