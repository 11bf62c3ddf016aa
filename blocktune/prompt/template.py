"""Gets the text around the chunks from any chat template, by rendering a sentinel.

Most templates ignore ``documents``, so the chunks are part of the user turn. The text before the
sentinel belongs to the prefix, the text after it to the query. Chunk text never passes through a
template, so none can trim or rewrite it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from itertools import product
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from blocktune.prompt.special_tokens import remembered

SENTINEL = "BlocktuneChunksStandHere"
REPLY = "BlocktuneReplyStandsHere"
PLAIN_REPLY_CUE = "\nAnswer:"
"""Asks for the answer if there is no chat template to start the assistant's turn."""
DATE = "26 Jul 2024"
"""Fixed date for templates (Llama 3.1's default), so that cached prefixes stay valid."""
_DATE = datetime.strptime(DATE, "%d %b %Y")
_CODES = "|replace('%-', '%')" + "".join(
    f"|replace('%{code}', '{_DATE:%{code}}')" for code in "YmdBbyAaHMSjeIp"
)
_TELL_DATE = f"{{%- macro strftime_now(format) -%}}{{{{ format{_CODES} }}}}{{%- endmacro -%}}"
"""Replaces the function from which Granite's and Mistral's templates get the date."""


def unrendered(tokenizer: PreTrainedTokenizerBase, what: str) -> ValueError:
    """The error for a chat template that cannot be used."""
    return ValueError(f"'{tokenizer.name_or_path}' has no chat template that renders {what}")


class Frame(NamedTuple):
    """The text before and after the chunks."""

    before: str
    after: str


def render_frame(
    tokenizer: PreTrainedTokenizerBase, system: str | None, head: str, tail: str
) -> Frame:
    """Renders one user turn ``head + chunks + tail`` and starts the assistant's turn.

    If the template rejects or drops the ``system`` text (Gemma), it goes before the user's. None
    leaves the default. ValueError: the template does not render the user's text exactly once.
    """
    if tokenizer.chat_template is None:
        parts = [part for part in (system, head) if part]
        return Frame("\n\n".join(parts), tail + PLAIN_REPLY_CUE)
    for text in _rendered(tokenizer, system, [("user", head + SENTINEL + tail)]):
        if text.count(SENTINEL) == 1 and (not system or system.strip() in text):
            before, after = text.split(SENTINEL)
            return Frame(before, after + around_reply(tokenizer).before)
    raise unrendered(tokenizer, "a user turn with text in it exactly once; set one")


@remembered("chat_template", "bos_token", "eos_token")
def around_reply(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """The text between the start of the assistant's turn and a reply (a channel), and after it.

    Both are empty if they cannot be determined.
    """
    replied = {"turns": _REPLIED, "add_generation_prompt": False}
    for text in _rendered(tokenizer, None, **replied) if tokenizer.chat_template else ():
        if text.count(REPLY) == 1:
            before, after = text.split(REPLY)
            starts = [x for x in _rendered(tokenizer, None, _REPLIED[:1]) if before.startswith(x)]
            opening = before.removeprefix(starts[0]) if starts else ""
            return Frame(opening if opening.strip() else "", after)
    return Frame("", "")


def render_next(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The text from an assistant's reply to its next, with a question. ValueError: not rendered."""
    if tokenizer.chat_template is None:
        return f"\n\n{question}{PLAIN_REPLY_CUE}"
    for text in _rendered(tokenizer, None, [*_REPLIED, ("user", question)]):
        if text.count(REPLY) == 1 and question.strip() in text:
            return text.split(REPLY)[1] + around_reply(tokenizer).before
    raise unrendered(tokenizer, "a second user turn; leave followups out, or set one")


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, system: str | None, turns: Sequence[tuple[str, str]]
) -> str:
    """Renders turns (role, text), the user's first and last, and starts the assistant's.

    Raises ValueError if there is no template, or it drops some text.
    """
    required = [text.strip() for role, text in turns if role == "user"] + [(system or "").strip()]
    for text in _rendered(tokenizer, system, turns) if tokenizer.chat_template else ():
        if all(part in text for part in required):
            return text + around_reply(tokenizer).before
    raise unrendered(tokenizer, "this conversation; leave turns out, or set one")


_REPLIED = [("user", "Hello."), ("assistant", REPLY)]
_IN_PARTS = ("", "system user assistant", "system user", "assistant")
"""Roles whose content is a list of parts, as multimodal templates want it, by preference."""


def _rendered(
    tokenizer: PreTrainedTokenizerBase,
    system: str | None,
    turns: Sequence[tuple[str, str]],
    add_generation_prompt: bool = True,
) -> Iterator[str]:
    """Renders a conversation in each form that the template accepts.

    The system text is a turn of its own, or else it starts the user's first, or precedes a reply.
    """
    (role, first), *others = turns
    joined = [("user", f"{system}\n\n{first}"), *others]
    folded = joined if role == "user" else [("user", system), *turns]
    forms = [[("system", system), *turns], folded] if system else [turns]
    template = tokenizer.get_chat_template()
    for form, roles in product(forms, _IN_PARTS if others else _IN_PARTS[:2]):
        messages = [
            {"role": role, "content": [{"type": "text", "text": text}] if role in roles else text}
            for role, text in form
        ]
        try:
            text = tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                chat_template=_TELL_DATE + template if "strftime_now" in template else template,
                add_generation_prompt=add_generation_prompt,
                **{"enable_thinking": False, "date_string": DATE},  # ignored by other templates
            )
        except (TemplateError, TypeError):
            continue
        # Some templates open a thinking block for the model: close it.
        opened = text.rstrip("\n")
        yield opened + "\n\n</think>\n\n" if opened.endswith("<think>") else text
