"""BOS: once, at the very start of a prompt, where the model has one."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from blocktune.prompt.encoding import encode


def with_bos(tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...]) -> tuple[int, ...]:
    """Adds BOS where the template leaves it to the tokenizer, and to plain text."""
    bos = tokenizer.bos_token_id
    if bos is None or bos in prefix:
        return prefix
    puts = encode(tokenizer, "a", add_special_tokens=True)[0] == bos
    return (bos, *prefix) if puts or tokenizer.chat_template is None else prefix


def check_bos(
    tokenizer: PreTrainedTokenizerBase, prefix: tuple[int, ...], *others: tuple[int, ...]
) -> None:
    """Raises ValueError if BOS stands anywhere but at the start of the prefix, or twice."""
    bos = tokenizer.bos_token_id
    if bos is None or _marks_turns(tokenizer):
        return
    count = sum(piece.count(bos) for piece in (prefix, *others))
    if count > 1 or (count == 1 and prefix[:1] != (bos,)):
        raise ValueError(
            f"the prompt holds the BOS token {tokenizer.bos_token!r} {count} times, it must open "
            f"the prompt and stand nowhere else; take it out of the instruction, the system text "
            f"or the chat template"
        )


def _marks_turns(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template opens every turn with BOS (SmolLM2's ``<|im_start|>``)."""
    return bool(tokenizer.chat_template) and tokenizer.bos_token in tokenizer.get_chat_template()
