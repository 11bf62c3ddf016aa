"""Gets the text around the chunks from any chat template, by rendering a sentinel.

Most templates ignore ``documents``, so the chunks are part of the user turn. A sentinel takes
their place while the template renders. The text before it belongs to the prefix, the text after it
to the query. Chunk text never passes through a template, so none can trim or rewrite it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

SENTINEL = "BlocktuneChunksStandHere"
REPLY = "BlocktuneReplyStandsHere"
PLAIN_REPLY_CUE = "\nAnswer:"
"""Asks for the answer if there is no chat template to start the assistant's turn."""
DATE = "26 Jul 2024"
"""Fixed date for templates (Llama 3.1's default), so that cached prefixes stay valid."""
_DATE = datetime.strptime(DATE, "%d %b %Y")
_CODES = "".join(f"|replace('%{code}', '{_DATE:%{code}}')" for code in "YmdBbyAaHMSj")
_TELL_DATE = f"{{%- macro strftime_now(format) -%}}{{{{ format{_CODES} }}}}{{%- endmacro -%}}"
"""Replaces the function from which Granite's and Mistral's templates get the date."""


class Frame(NamedTuple):
    """The text before and after the chunks."""

    before: str
    after: str


def render_frame(
    tokenizer: PreTrainedTokenizerBase, system: str | None, head: str, tail: str
) -> Frame:
    """Renders one user turn ``head + chunks + tail`` and starts the assistant's turn.

    If the template rejects or drops the ``system`` text (Gemma), it goes before the user's. None
    leaves the template's default. Without a chat template the frame is plain text. Raises
    ValueError if the template does not render the user's text exactly once.
    """
    if tokenizer.chat_template is None:
        parts = [part for part in (system, head) if part]
        return Frame("\n\n".join(parts), tail + PLAIN_REPLY_CUE)
    content = head + SENTINEL + tail
    for messages in _conversations(system, content):
        text = _render(tokenizer, messages, add_generation_prompt=True)
        is_complete = text is not None and text.count(SENTINEL) == 1
        if is_complete and (not system or system.strip() in text):
            return Frame(*text.split(SENTINEL))
    raise ValueError(
        f"the chat template of '{tokenizer.name_or_path}' does not render a user turn with "
        f"text in it exactly once; set tokenizer.chat_template to one that does"
    )


def reply_end(tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that the template adds after the assistant's; empty if it cannot be determined."""
    if tokenizer.chat_template is None:
        return ""
    for messages in _conversations(None, "Hello."):
        for content in (REPLY, _listed(REPLY)):
            text = _render(tokenizer, [*messages, {"role": "assistant", "content": content}])
            if text is not None and text.count(REPLY) == 1:
                return text.split(REPLY)[1]
    return ""


def render_next(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The text from the end of an assistant's reply to the start of the next, with a question.

    Raises ValueError if the template does not render a second user turn.
    """
    if tokenizer.chat_template is None:
        return f"\n\n{question}{PLAIN_REPLY_CUE}"
    for first in _conversations(None, "Hello."):
        more = _like(first, [("assistant", REPLY), ("user", question)])
        text = _render(tokenizer, [*first, *more], add_generation_prompt=True)
        if text is not None and text.count(REPLY) == 1 and question.strip() in text:
            return text.split(REPLY)[1]
    raise ValueError(
        f"the chat template of '{tokenizer.name_or_path}' does not render a second user turn; "
        "leave followups out, or set tokenizer.chat_template to one that does"
    )


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, system: str | None, turns: Sequence[tuple[str, str]]
) -> str:
    """Renders turns (role, text) that begin and end with the user, and starts the assistant's.

    Raises ValueError if there is no template, or it drops some text.
    """
    required = [text.strip() for role, text in turns if role == "user"] + [(system or "").strip()]
    for first in _conversations(system, turns[0][1]) if tokenizer.chat_template else ():
        messages = [*first, *_like(first, turns[1:])]
        text = _render(tokenizer, messages, add_generation_prompt=True)
        if text is not None and all(part in text for part in required):
            return text
    raise ValueError(
        f"'{tokenizer.name_or_path}' has no chat template that renders this conversation; leave "
        "turns out, or set tokenizer.chat_template to one that does"
    )


def _conversations(system: str | None, content: str):
    """Yields forms of the first turn by preference. Multimodal templates want lists of parts."""
    folded = [{"role": "user", "content": f"{system}\n\n{content}" if system else content}]
    apart = [{"role": "system", "content": system}, {"role": "user", "content": content}]
    for messages in [apart, folded] if system else [folded]:
        yield messages
        yield [{**m, "content": _listed(m["content"])} for m in messages]


def _like(first: list[dict[str, Any]], turns: Sequence[tuple[str, str]]) -> list[dict[str, Any]]:
    as_list = isinstance(first[-1]["content"], list)
    return [{"role": role, "content": _listed(t) if as_list else t} for role, t in turns]


def _listed(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _render(tokenizer, messages: list[dict[str, Any]], **kwargs) -> str | None:
    template = tokenizer.get_chat_template()
    dated = "strftime_now" in template
    try:
        text = tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            chat_template=_TELL_DATE + template if dated else template,
            **{"enable_thinking": False, "date_string": DATE},  # ignored by other templates
            **kwargs,
        )
    except (TemplateError, TypeError):
        return None
    # Some templates open a thinking block for the model: close it.
    opened = text.rstrip("\n")
    return opened + "\n\n</think>\n\n" if opened.endswith("<think>") else text
