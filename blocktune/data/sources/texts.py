"""Records that hold no chunks of their own: conversations, documents, summaries, pairs, evidence.

A chunker cuts them; each becomes a `RagExample` whose last piece is what the model writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking import Chunker, Message, chunks_of, tidy, trimmed
from blocktune.data.chunking.base import SPEAKERS
from blocktune.data.example import RagExample, field_error, is_conversation
from blocktune.data.sources.schemas import LeftOut, not_blank
from blocktune.prompt.format import Chunk

CONTINUE = "Continue the text above."
SUMMARIZE = "Write a short summary of the text above."
_ROLES = {role: role for role in SPEAKERS} | {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
}
_CODE = re.compile(r"```|\n(?: {4}|\t)[^\s]")
"""A fence, or a line that is indented as code is."""
_PAIRS = (
    ("dialogue", "summary", "Dialogue", "Summary"),
    ("document", "summary", "Document", "Summary"),
    ("question", "answer", "Question", "Answer"),
    ("prompt", "completion", "Input", "Output"),
    ("input", "output", "Input", "Output"),
)
"""Fields of a task's instances and how a shot names them."""


class Cutter(NamedTuple):
    """A chunker with the tokenizer it may count by."""

    chunker: Chunker
    tokenizer: PreTrainedTokenizerBase | None = None

    def text(self, text: str) -> list[str]:
        """Spans of a text."""
        return self.chunker.split(text, self.tokenizer)

    def messages(self, messages: list[Message]) -> list[str]:
        """Spans of a conversation."""
        return self.chunker.split_messages(messages, self.tokenizer)


def parse_chat(record: Mapping[str, Any], cutter: Cutter) -> RagExample:
    """A conversation: the last user message asks, the assistant's reply to it is the response.

    What was said before is cut into chunks. A single question is cut itself, and its last piece
    asks; one that holds code is left out, since its lines would part.

    Source: KVLink's ``sft_mem`` and Block-Attention's Tulu-3 data (Tulu: ``messages``).
    """
    messages = _messages(record)
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if len(messages) < 2 or messages[-2].role != "user":
        raise LeftOut("no user message with a reply")
    *history, asked, reply = messages
    question = asked.text
    chunks = chunks_of(cutter.messages(history))
    if all(message.role == "system" for message in history):
        if _CODE.search(asked.text):
            raise LeftOut("a single message that holds code")
        *spans, question = tidy(cutter.text(asked.text))
        chunks += tuple(map(Chunk, spans))
    if not chunks:
        raise LeftOut("a single message that the chunker leaves whole")
    said = tuple((message.role, message.text) for message in (*history, asked))
    return RagExample(
        question=trimmed(question),
        chunks=chunks,
        response=reply.text,
        kind="chat",
        id=_id(record),
        conversation=said if is_conversation(said) else (),
    )


def parse_document(record: Mapping[str, Any], cutter: Cutter) -> RagExample:
    """A plain text: all spans but the last are chunks, the last is what the model writes.

    Source: KVLink's ``text_mem`` on FineWeb.
    """
    text = _text(record, "text")
    *spans, last = tidy(cutter.text(text)) or [text]
    if not spans:
        raise LeftOut("a text that the chunker leaves whole")
    title = record.get("title") or None
    chunks = tuple(Chunk(span, title) for span in spans)
    return RagExample(CONTINUE, chunks, (), last, "document", _id(record))


def parse_summary(record: Mapping[str, Any], cutter: Cutter) -> RagExample:
    """A text and its summary; MultiNews' documents, parted by ``|||||``, stay whole.

    Source: KVLink's ``xsum``; MultiNews, arXiv:1906.01749.
    """
    text = _text(record, "document")
    documents = [part for part in text.split("|||||") if part.strip()]
    spans = documents if len(documents) > 1 else cutter.text(text)
    summary = _text(record, "summary").strip()
    return RagExample(
        SUMMARIZE, chunks_of(spans), (summary.lstrip("\u2013 "),), None, "summary", _id(record)
    )


def parse_pair(record: Mapping[str, Any]) -> RagExample:
    """One instance of a task, its only chunk being itself as a shot; `with_shots` gives others.

    Source: CacheBlend's SAMSum, where each solved example in the context is a chunk.
    """
    there = [pair for pair in _PAIRS if pair[0] in record and pair[1] in record]
    said = [pair for pair in there if None not in (record[pair[0]], record[pair[1]])]
    for field, target, name, label in said or there:
        given, wanted = _text(record, field).strip(), _text(record, target).strip()
        question = f"{name}:\n{given}\n{label}:"
        shot = Chunk(f"{question} {wanted}")
        return RagExample(question, (shot,), (wanted,), None, "few-shot", _id(record))
    known = "; ".join(f"{field}, {target}" for field, target, *_ in _PAIRS)
    raise ValueError(f"a pair must have the fields of one of {known}; got {', '.join(record)}")


def parse_trivia(record: Mapping[str, Any], cutter: Cutter) -> RagExample:
    """TriviaQA ``rc``: its evidence pages, cut; ``blocktune data passages`` keeps the best chunks.

    Source: TriviaQA, arXiv:1705.03551, as on the Hub.
    """
    chunks: tuple[Chunk, ...] = ()
    for field, texts in (("entity_pages", "wiki_context"), ("search_results", "search_context")):
        for title, text in _pages(record, field, texts):
            chunks += chunks_of(cutter.text(text), title)
    if not chunks:
        raise LeftOut("no evidence; add passages with `blocktune data passages`")
    return RagExample(record.get("question"), chunks, trivia_answers(record), id=_id(record))


def _pages(record: Mapping[str, Any], field: str, texts: str) -> list[tuple[str | None, str]]:
    pages = record.get(field) or {}
    found = pages.get(texts, []) if isinstance(pages, Mapping) else None
    if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
        raise field_error(field, f'an object of lists "title", "{texts}"', pages)
    return list(zip(pages.get("title", [None] * len(found)), found, strict=False))


def trivia_answers(record: Mapping[str, Any]) -> tuple[str, ...]:
    """The answer and its aliases."""
    answer = record.get("answer")
    if not isinstance(answer, Mapping) or "value" not in answer:
        raise field_error("answer", '{"value", "aliases"}', answer)
    return not_blank([answer["value"], *(answer.get("aliases") or ())])


def _messages(record: Mapping[str, Any]) -> list[Message]:
    name = "messages" if record.get("messages") is not None else "conversations"
    entries = record.get(name)
    wanted = 'a list of {"role", "content"} or {"from", "value"}'
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
        raise field_error(name, wanted, entries)
    return [m for m in map(partial(_message, name), entries) if m.text.strip()]


def _message(name: str, entry: Mapping[str, Any]) -> Message:
    role = entry.get("role", entry.get("from"))
    text = entry.get("content", entry.get("value"))
    if isinstance(text, list):  # parts, of which those of text are kept
        text = "".join(part.get("text") or "" for part in text if isinstance(part, Mapping))
    if role not in _ROLES or not isinstance(text, str | None):
        raise field_error(name, f"messages of the roles {', '.join(_ROLES)}, with text", entry)
    return Message(_ROLES[role], text or "")


def _text(record: Mapping[str, Any], field: str) -> str:
    value = record.get(field, 0)  # absent is a mistake, null is a row without it
    if not isinstance(value, str | None):
        raise field_error(field, "a string", record.get(field))
    if not (value or "").strip():
        raise LeftOut(f'"{field}" is blank')
    return value


def _id(record: Mapping[str, Any]) -> str:
    return next((str(record[key]) for key in ("id", "_id", "question_id") if record.get(key)), "")
