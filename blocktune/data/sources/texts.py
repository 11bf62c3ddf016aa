"""Converters of records that are not questions over passages: conversations, documents, pairs."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import chain, islice
from random import Random
from typing import Any

from blocktune.data.chunking import SPEAKERS, Message, chunks_of, tidy, trimmed
from blocktune.data.example import RagExample, answers_of, field_error, is_conversation, read_chunks
from blocktune.data.sources.records import LeftOut
from blocktune.data.sources.schemas import SUMMARIZE, Cutter, id_of
from blocktune.prompt.format import Chunk

CONTINUE = "Continue the text above."
POOL = 1000  # shots are drawn from the first 1,000 instances of a source, whatever its limit
_ROLES = {role: role for role in SPEAKERS}
_ROLES |= {"human": "user", "developer": "system", "function": "tool", "observation": "tool"}
_ROLES |= dict.fromkeys(("gpt", "bot", "agent", "model"), "assistant")
_CODE = re.compile(r"```|\n(?: {4}|\t)[^\s]")  # a Markdown code fence or an indented line
_PAIRS = (
    ("dialogue", "summary", "Dialogue", "Summary"),
    ("document", "summary", "Document", "Summary"),
    ("question", "answer", "Question", "Answer"),
    ("prompt", "completion", "Input", "Output"),
    ("input", "output", "Input", "Output"),
)
"""Input and output field of few-shot tasks, and the labels of both in a shot."""
GROUNDED = ("messages", "conversations", "prompt")  # fields of a conversation over documents


def parse_chat(record: Mapping[str, Any], cutter: Cutter) -> RagExample:
    """Converts a conversation: the last user message is the question, its reply the response.

    Earlier messages are split into chunks. If there are none, the user message itself is split, and
    its last span is the question; with code in it, which splitting would break, it is left out
    (KVLink's ``sft_mem``, Block-Attention).
    """
    messages = _dialogue(record)
    while messages and messages[-1].role != "assistant":
        messages.pop()
    if len(messages) < 2 or messages[-2].role != "user":
        raise LeftOut("no user message with a reply")
    *history, last, reply = messages
    _require_learned([reply])
    question = last.text
    chunks = chunks_of(cutter.messages(history))
    if all(message.role == "system" for message in history):
        if _CODE.search(last.text):
            raise LeftOut("a single message that holds code")
        *spans, question = tidy(cutter.text(last.text))
        chunks += tuple(map(Chunk, spans))
    if not chunks:
        raise LeftOut("a single message that the chunker leaves whole")
    turns = tuple((message.role, message.text) for message in (*history, last))
    given = {"kind": "chat", "conversation": turns if is_conversation(turns) else ()}
    return RagExample(trimmed(question), chunks, (), reply.text, id=id_of(record), **given)


def parse_grounded(record: Mapping[str, Any]) -> RagExample:
    """Converts a conversation over ``documents``; every reply is a training target.

    A system message is kept in ``meta["system"]``, for the prompt in training.
    """
    messages = _dialogue(record)
    _require_learned(messages)
    meta = {"system": messages.pop(0).text} if messages and messages[0].role == "system" else {}
    roles = [message.role for message in messages]
    if roles != ["user"] and (not roles or roles != ["user", "assistant"] * (len(roles) // 2)):
        raise field_error("messages", "user and assistant in turn, the assistant's last", roles)
    question, response, *more = [*(message.text for message in messages), None][: len(roles) + 1]
    chunks = read_chunks(record.get("documents"), "documents")
    followups = tuple(zip(more[::2], more[1::2], strict=False))
    given = {"id": id_of(record), "meta": meta, "followups": followups}
    return RagExample(question, chunks, answers_of(record), response, **given)


def _require_learned(replies: list[Message]) -> None:
    if not all(message.is_learned for message in replies if message.role == "assistant"):
        raise LeftOut("a reply that is marked as not to be learned")


def _dialogue(record: Mapping[str, Any]) -> list[Message]:
    """The messages of a record in any of its fields, after its system prompt."""
    name = next((name for name in GROUNDED if record.get(name) is not None), GROUNDED[0])
    messages = _messages(record, name)
    messages += _messages(record, "completion") if name == "prompt" else []
    has_system = messages and messages[0].role == "system"
    if has_system or not isinstance(record.get("system"), str | list):
        return messages
    return _messages(record, "system") + messages


def parse_document(record: Mapping[str, Any], cutter: Cutter) -> RagExample:
    """Converts a plain text, as KVLink's ``text_mem``: its last span is the target of training."""
    text = _text(record, "text")
    *spans, last = tidy(cutter.text(text)) or [text]
    if not spans:
        raise LeftOut("a text that the chunker leaves whole")
    title = record.get("title") or None
    chunks = tuple(Chunk(span, title) for span in spans)
    return RagExample(CONTINUE, chunks, (), last, "document", id_of(record))


def parse_summary(record: Mapping[str, Any], cutter: Cutter) -> RagExample:
    """Converts a text with its summary (XSum), or documents with one (MultiNews), a chunk each."""
    text = _text(record, "document")
    documents = [part for part in text.split("|||||") if part.strip()]
    spans = documents if len(documents) > 1 else cutter.text(text)
    summary = _text(record, "summary").strip().lstrip("\u2013 ")
    return RagExample(SUMMARIZE, chunks_of(spans), (summary,), None, "summary", id_of(record))


def parse_pair(record: Mapping[str, Any]) -> RagExample:
    """Converts an input-output pair. Its only chunk is the solved pair, for use by `with_shots`."""
    present = [pair for pair in _PAIRS if pair[0] in record and pair[1] in record]
    filled = [pair for pair in present if None not in (record[pair[0]], record[pair[1]])]
    for field, target, name, label in filled or present:
        given, answer = _text(record, field).strip(), _text(record, target).strip()
        question = f"{name}:\n{given}\n{label}:"
        shot = Chunk(f"{question} {answer}")
        return RagExample(question, (shot,), (answer,), None, "few-shot", id_of(record))
    known = "; ".join(f"{field}, {target}" for field, target, *_ in _PAIRS)
    raise ValueError(f"a pair must have the fields of one of {known}; got {', '.join(record)}")


def parse_session(record: Mapping[str, Any]) -> RagExample:
    """Converts MT-RAG (https://github.com/IBM/mt-rag-benchmark): all messages are the question."""
    messages, replies = _messages(record, "input"), _messages(record, "targets")
    if not record["contexts"]:
        raise LeftOut("no passages in contexts")
    if not messages or messages[-1].role != "user":
        raise LeftOut("the last message is not the user's")
    known = ("contexts", "input", "targets", "task_id")
    question = "\n".join(map(str, messages)) if messages[1:] else messages[0].text
    chunks, answers = read_chunks(record["contexts"], "contexts"), [m.text for m in replies]
    meta = {k: v for k, v in record.items() if k not in known and v is not None}
    name = str(record.get("task_id") or "")
    return RagExample(question, chunks, answers, kind="chat", id=name, meta=meta)


def with_shots(examples: Iterator[RagExample], shots: int, seed: int) -> Iterator[RagExample]:
    """Gives every example ``shots`` others, solved, as chunks (few-shot).

    The draw for example ``i`` does not depend on the number of examples.
    """
    pool = list(islice(examples, POOL))
    needed = shots + 1  # the example itself may be drawn
    if len(pool) < needed:
        raise ValueError(f"{shots} shots need {needed} instances, got {len(pool)}; lower shots")
    for index, example in enumerate(chain(pool, examples)):
        drawn = Random(f"shots/{seed}/{index}").sample(range(len(pool)), needed)
        kept = [i for i in drawn if i != index]
        yield replace(example, chunks=tuple(pool[i].chunks[0] for i in kept[:shots]))


_TEXT_ROLES = {"prompt": "user", "completion": "assistant", "system": "system"}
"""Fields that may hold a text instead of messages (TRL, Anthropic, LLaMA-Factory)."""


def _messages(record: Mapping[str, Any], name: str) -> list[Message]:
    entries = record.get(name)
    if name in _TEXT_ROLES and isinstance(entries, str | None):
        entries = [{"role": _TEXT_ROLES[name], "content": entries}]
    wanted = 'a list of {"role", "content"}, {"from", "value"} or {"speaker", "text"}'
    if not isinstance(entries, list) or not all(isinstance(e, Mapping) for e in entries):
        raise field_error(name, wanted, entries)
    return [m for m in map(partial(_message, name), entries) if m.text.strip()]


def _message(name: str, entry: Mapping[str, Any]) -> Message:
    entry = {key: value for key, value in entry.items() if value is not None}  # tables fill up
    role = entry.get("role", entry.get("from", entry.get("speaker")))
    text = entry.get("content", entry.get("value", entry.get("text")))
    role = role.lower() if isinstance(role, str) else role
    if entry.get("tool_calls") or role in ("function_call", "tool_call"):
        raise LeftOut("a message that calls tools")
    if isinstance(text, list):  # content parts
        parts = [_part_text(part) if isinstance(part, Mapping) else part for part in text]
        if not all(isinstance(part, str) for part in parts):
            raise LeftOut("a message with an image or another part that is not text")
        text = "".join(parts)
    if role not in _ROLES or not isinstance(text, str | None):
        raise field_error(name, f"messages of the roles {', '.join(_ROLES)}, with text", entry)
    is_learned = 0 not in map(entry.get, ("weight", "train", "training"))  # OpenAI, Axolotl
    return Message(_ROLES[role], text or "", is_learned)


def _part_text(part: Mapping[str, Any]) -> str | None:
    return part.get("text") or ("" if part.get("type") == "text" else None)


def _text(record: Mapping[str, Any], field: str) -> str:
    value = record.get(field, 0)  # a missing field is an error; null is an unusable row
    if not isinstance(value, str | None):
        raise field_error(field, "a string", record.get(field))
    if not (value or "").strip():
        raise LeftOut(f'"{field}" is blank')
    return value
