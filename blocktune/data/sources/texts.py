"""Records that are not a question over passages: conversations, documents, summaries, pairs.

A chunker cuts them; the last piece is what the model writes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from random import Random
from typing import Any

from blocktune.data.chunking import SPEAKERS, Message, chunks_of, tidy, trimmed
from blocktune.data.example import RagExample, field_error, is_conversation, read_chunks
from blocktune.data.sources.records import LeftOut
from blocktune.data.sources.schemas import SUMMARIZE, Cutter, id_of
from blocktune.prompt.format import Chunk

CONTINUE = "Continue the text above."
POOL = 1000  # instances that shots are drawn from: the first of a source, whatever its limit
_ROLES = {role: role for role in SPEAKERS} | {
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "agent": "assistant",
    "model": "assistant",
    "developer": "system",
    "function": "tool",
}
_CODE = re.compile(r"```|\n(?: {4}|\t)[^\s]")  # a fence, or a line indented like code
_PAIRS = (
    ("dialogue", "summary", "Dialogue", "Summary"),
    ("document", "summary", "Document", "Summary"),
    ("question", "answer", "Question", "Answer"),
    ("prompt", "completion", "Input", "Output"),
    ("input", "output", "Input", "Output"),
)
"""Fields of a task's instances, and their names in a shot."""


def parse_chat(record: Mapping[str, Any], cutter: Cutter) -> RagExample:
    """A conversation: the last user message asks, the assistant's reply to it is the response.

    Earlier messages are cut into chunks. A single question is itself cut, and its last piece is
    the question; one with code is left out, since cutting would break it.

    Source: KVLink's ``sft_mem`` and Block-Attention's Tulu-3 data (Tulu: ``messages``).
    """
    name = "messages" if record.get("messages") is not None else "conversations"
    messages = _messages(record, name)
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
        id=id_of(record),
        conversation=said if is_conversation(said) else (),
    )


def parse_grounded(record: Mapping[str, Any]) -> RagExample:
    """A conversation over ``documents``: the user asks, every reply is one to learn.

    ``meta["system"]`` is the system's turn, which training puts into the prompt.
    """
    if record.get("messages") is not None:
        messages = _messages(record, "messages")
    else:
        messages = [*_said(record, "prompt"), *_said(record, "completion")]
    meta = {"system": messages.pop(0).text} if messages and messages[0].role == "system" else {}
    roles = [message.role for message in messages]
    if roles != ["user"] and (not roles or roles != ["user", "assistant"] * (len(roles) // 2)):
        raise field_error("messages", "user and assistant in turn, the assistant's last", roles)
    question, response, *more = [*(message.text for message in messages), None][: len(roles) + 1]
    return RagExample(
        question=question,
        chunks=read_chunks(record["documents"], "documents"),
        response=response,
        followups=tuple(zip(more[::2], more[1::2], strict=False)),
        id=id_of(record),
        meta=meta,
    )


def _said(record: Mapping[str, Any], name: str) -> list[Message]:
    """The messages of TRL's ``prompt`` or ``completion``, either of which may be a text."""
    value = record.get(name)
    if isinstance(value, str | None):
        role = "user" if name == "prompt" else "assistant"
        return [Message(role, value)] if (value or "").strip() else []
    return _messages(record, name)


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
    return RagExample(CONTINUE, chunks, (), last, "document", id_of(record))


def parse_summary(record: Mapping[str, Any], cutter: Cutter) -> RagExample:
    """A text and its summary; MultiNews' documents, separated by ``|||||``, stay whole.

    Source: KVLink's ``xsum``; MultiNews, arXiv:1906.01749.
    """
    text = _text(record, "document")
    documents = [part for part in text.split("|||||") if part.strip()]
    spans = documents if len(documents) > 1 else cutter.text(text)
    summary = _text(record, "summary").strip()
    return RagExample(
        SUMMARIZE, chunks_of(spans), (summary.lstrip("\u2013 "),), None, "summary", id_of(record)
    )


def parse_pair(record: Mapping[str, Any]) -> RagExample:
    """One instance of a task, whose only chunk is itself as a shot; see `with_shots`.

    Source: CacheBlend's SAMSum, where each solved example in the context is a chunk.
    """
    there = [pair for pair in _PAIRS if pair[0] in record and pair[1] in record]
    said = [pair for pair in there if None not in (record[pair[0]], record[pair[1]])]
    for field, target, name, label in said or there:
        given, wanted = _text(record, field).strip(), _text(record, target).strip()
        question = f"{name}:\n{given}\n{label}:"
        shot = Chunk(f"{question} {wanted}")
        return RagExample(question, (shot,), (wanted,), None, "few-shot", id_of(record))
    known = "; ".join(f"{field}, {target}" for field, target, *_ in _PAIRS)
    raise ValueError(f"a pair must have the fields of one of {known}; got {', '.join(record)}")


def parse_session(record: Mapping[str, Any]) -> RagExample:
    """MT-RAG: a conversation over retrieved ``contexts``; the last message asks.

    The messages before it are of this conversation alone, so they are part of the question.

    Source: https://github.com/IBM/mt-rag-benchmark, reference tasks.
    """
    messages, replies = _messages(record, "input"), _messages(record, "targets")
    if not record["contexts"]:
        raise LeftOut("no passages in contexts")
    if not messages or messages[-1].role != "user":
        raise LeftOut("the last message is not the user's")
    known = ("contexts", "input", "targets", "task_id")
    return RagExample(
        question="\n".join(map(str, messages)) if messages[1:] else messages[0].text,
        chunks=read_chunks(record["contexts"], "contexts"),
        answers=tuple(reply.text for reply in replies),
        kind="chat",
        id=str(record.get("task_id") or ""),
        meta={k: v for k, v in record.items() if k not in known and v is not None},
    )


def with_shots(
    examples: Iterable[RagExample],
    *,
    shots: int,
    seed: int = 0,
    others: Iterable[RagExample] | None = None,
) -> Iterator[RagExample]:
    """Few-shot: gives every instance ``shots`` other solved instances as chunks, never itself.

    They come from ``others``, e.g. another split, or the examples themselves. Example ``i`` gets
    the same ones for any number of examples.
    """
    examples = iter(examples)
    pool = list(islice(examples if others is None else others, POOL))
    spare = shots + (others is None)
    if len(pool) < spare:
        raise ValueError(f"{shots} shots need {spare} instances, got {len(pool)}; lower shots")
    for index, example in enumerate(examples if others is not None else chain(pool, examples)):
        drawn = Random(f"shots/{seed}/{index}").sample(range(len(pool)), spare)
        kept = drawn if others is not None else [i for i in drawn if i != index]
        yield replace(example, chunks=tuple(pool[i].chunks[0] for i in kept[:shots]))


def _messages(record: Mapping[str, Any], name: str) -> list[Message]:
    entries = record.get(name)
    wanted = 'a list of {"role", "content"}, {"from", "value"} or {"speaker", "text"}'
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
        raise field_error(name, wanted, entries)
    return [m for m in map(partial(_message, name), entries) if m.text.strip()]


def _message(name: str, entry: Mapping[str, Any]) -> Message:
    role = entry.get("role", entry.get("from", entry.get("speaker")))
    text = entry.get("content", entry.get("value", entry.get("text")))
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
