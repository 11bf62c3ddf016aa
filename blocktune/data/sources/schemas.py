"""Converters of question-answering records, in the formats of public data sets, to examples."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking import Chunker, Message, chunks_of, tidy
from blocktune.data.example import (
    NO_ANSWER,
    RagExample,
    answers_of,
    as_id,
    chunk_fields,
    field_error,
    passages_in,
    plain,
    read_chunks,
)
from blocktune.data.sources.records import LeftOut
from blocktune.prompt.format import Chunk

PASSAGES = ("ctxs", "passages", "contexts", "retrieved_contexts", "documents", "docs")
"""Fields that may hold a question's passages, besides blocktune's own ``chunks``."""
SUMMARIZE = "Write a short summary of the text above."

_NUMBERED = re.compile(r"^(?=Passage \d+:\n)", re.MULTILINE)  # LongBench's joined passages


class Cutter(NamedTuple):
    """A chunker, with the tokenizer that it needs to count tokens."""

    chunker: Chunker
    tokenizer: PreTrainedTokenizerBase | None = None

    def text(self, text: str) -> list[str]:
        """Spans of a text."""
        return self.chunker.split(text, self.tokenizer)

    def messages(self, messages: list[Message]) -> list[str]:
        """Spans of a conversation."""
        return self.chunker.split_messages(messages, self.tokenizer)


def parse_own(record: Mapping[str, Any], cutter: Cutter | None = None) -> RagExample:
    """Converts blocktune's own format, in which ``chunks`` may be one text that a cutter splits."""
    _require_answerable(record)
    return RagExample.from_json(_cut(record, "chunks", cutter))


def _require_answerable(record: Mapping[str, Any]) -> None:
    """Raises `LeftOut` for a question that its data set marks as unanswerable.

    An empty list does not count as such a mark: test sets use it to hide their answers.
    """
    answers = plain(record.get("answers"))
    marks = (
        record.get("is_impossible") is True,  # SQuAD 2
        isinstance(answers, Mapping) and answers.get("text") == [],  # SQuAD 2 on the Hub
        record.get("answerable") is False,  # MuSiQue
        answers in (NO_ANSWER, [NO_ANSWER]),
    )
    if any(marks) and not record.get("response"):
        raise LeftOut("marked as impossible to answer")


def _cut(
    record: Mapping[str, Any], name: str, cutter: Cutter | None, title: Any = None
) -> Mapping[str, Any]:
    """The record with passages in a field; one text in it is cut if there is a cutter."""
    text = record.get(name)
    if isinstance(text, str):
        spans = (cutter and tidy(cutter.text(text))) or [text]
        return {**record, name: [{"title": title, "text": span} for span in spans]}
    if cutter:
        raise ValueError("records have chunks already; leave the chunker out")
    return record


def parse_musique(record: Mapping[str, Any]) -> RagExample:
    """Converts MuSiQue (https://github.com/StonyBrookNLP/musique); an id is ``3hop1__...``."""
    match = re.match(r"(\d+)hop", str(record.get("id", "")))
    hops = match[1] if match else len(record.get("question_decomposition") or ())
    return _example(record, "paragraphs", f"{hops}-hop" if hops else "")


def parse_wiki(record: Mapping[str, Any], cutter: Cutter | None = None) -> RagExample:
    """Converts HotpotQA and 2WikiMultihopQA, original or from the Hub, and SQuAD from the Hub.

    ``context`` is one text, or passages in any form that `RagExample` reads. Rows without one, as
    in some copies of https://github.com/Alab-NII/2wikimultihop, are left out.
    """
    context = record.get("context")
    if not (any(context.values()) if isinstance(context, Mapping) else context):
        raise LeftOut("no context")
    facts = record.get("supporting_facts") or ()
    try:
        if isinstance(facts, Mapping):
            facts = [{"title": title} for title in facts["title"]]
        titles = [fact["title"] if isinstance(fact, Mapping) else fact[0] for fact in facts]
    except (KeyError, TypeError, IndexError):
        wanted = 'a list of [title, sentence] or {"title"}'
        raise field_error("supporting_facts", wanted, facts) from None
    record = _cut(record, "context", cutter, record.get("title"))
    return _example(record, "context", str(record.get("type") or ""), titles)


def parse_ctxs(record: Mapping[str, Any]) -> RagExample:
    """Converts a question with `PASSAGES`: CacheBlend's and FiD's ``ctxs``, RAGAS' ``contexts``.

    A record with other fields of blocktune's own format is one, except for the name of its chunks.
    """
    name = next((name for name in PASSAGES if record.get(name) is not None), PASSAGES[0])
    if any(record.get(key) is not None for key in ("response", "kind", "supporting", "followups")):
        return parse_own({**record, name: None, "chunks": record.get(name)})
    return _example(record, name, str(record.get("type") or ""))


def parse_ragas(record: Mapping[str, Any]) -> RagExample:
    """Converts RAGAS' ``SingleTurnSample``. The answer is ``reference``, not ``response``."""
    renamed = {"question": record["user_input"], "answers": record.get("reference")}
    return _example({**record, **renamed}, "retrieved_contexts")


def parse_longbench(record: Mapping[str, Any], cutter: Cutter) -> RagExample:
    """Converts LongBench and InfiniteBench: ``input`` is the question, ``context`` one long text.

    The context is split at its numbered passages, else by the cutter. Summarisation tasks have a
    blank question, which becomes `SUMMARIZE`. Source: arXiv:2308.14508; v2 arXiv:2412.15204.
    """
    context, question = record.get("context"), record.get("input", record.get("question"))
    if not isinstance(context, str) or not isinstance(question, str):
        raise field_error("context", 'a text, as "input" is', context)
    if not context.strip():
        raise LeftOut("no context")
    spans = [span for span in _NUMBERED.split(context) if span.strip()]
    chunks = chunks_of(spans if len(spans) > 1 else cutter.text(context))
    known = ("input", "question", "context", "answers", "answer", "id", "_id")
    question, answers = _with_choices(record, question if question.strip() else SUMMARIZE)
    kind = str(record.get("dataset") or record.get("domain") or "")
    meta = {k: v for k, v in record.items() if k not in known and v is not None}
    return RagExample(question, chunks, answers, kind=kind, id=id_of(record), meta=meta)


def parse_trivia(record: Mapping[str, Any], cutter: Cutter) -> RagExample:
    """Converts TriviaQA ``rc`` (arXiv:1705.03551): all its evidence pages, split by the cutter."""
    chunks: tuple[Chunk, ...] = ()
    for field, texts in (("entity_pages", "wiki_context"), ("search_results", "search_context")):
        pages = record.get(field) or {}
        bodies = pages.get(texts, []) if isinstance(pages, Mapping) else None
        if not isinstance(bodies, list) or not all(isinstance(text, str) for text in bodies):
            raise field_error(field, f'an object of lists "title", "{texts}"', pages)
        for title, text in zip(pages.get("title", [None] * len(bodies)), bodies, strict=False):
            chunks += chunks_of(cutter.text(text), title)
    if not chunks:
        raise LeftOut("no evidence; add passages with `blocktune data passages`")
    return RagExample(record.get("question"), chunks, answers_of(record), id=id_of(record))


def _with_choices(record: Mapping[str, Any], question: Any) -> tuple[Any, tuple[str, ...]]:
    """The question with its choices and a request for their words, and the accepted answers.

    An answer that is the letter of a choice becomes its text: "A" is an article to the metrics.
    """
    given = record.get("options") or record.get("choices")
    given = given or [record.get(f"choice_{letter}") for letter in "ABCD"]
    given = given if isinstance(given, list) else []
    choices = {chr(ord("A") + i): text for i, text in enumerate(given) if isinstance(text, str)}
    if choices and isinstance(question, str):
        lines = (f"({letter}) {text}" for letter, text in choices.items())
        question = "\n".join((question, "Choices:", *lines, "Answer in the words of one choice."))
    answers = tuple(dict.fromkeys(choices.get(answer, answer) for answer in answers_of(record)))
    numbers = [
        a.isdecimal() and int(a) <= len(choices) and a not in choices.values() for a in answers
    ]
    if choices and answers and all(numbers):
        raise field_error("answers", "the text or letter of a choice, no number", answers)
    return question, answers


def _example(
    record: Mapping[str, Any], name: str, kind: str = "", supporting: Collection[str] = ()
) -> RagExample:
    """Builds an example from the passages in the field ``name``, without blank ones.

    Titles in ``supporting`` and passages with ``is_supporting`` are evidence.
    """
    _require_answerable(record)
    entries = passages_in(record.get(name), name)
    passages = [chunk_fields(entry, f"{name}[{i}]") for i, entry in enumerate(entries)]
    kept = [p for p in passages if not (isinstance(p["text"], str) and not p["text"].strip())]
    if entries and not kept:
        raise LeftOut("no passage with text")
    blank = len(passages) - len(kept)
    chunks = read_chunks(kept, name)
    evidence = (c.title in supporting or c.metadata.get("is_supporting") for c in chunks)
    question, answers = _with_choices(record, record.get("question"))
    return RagExample(
        question,
        chunks,
        answers,
        kind=kind,
        id=id_of(record),
        supporting=tuple(index for index, holds in enumerate(evidence) if holds),
        meta={"blank_passages": blank} if blank else {},
    )


def id_of(record: Mapping[str, Any]) -> str:
    """The identifier of a record, or an empty string."""
    ids = (str(as_id(record.get(key))) for key in ("id", "_id", "question_id", "query_id", "qid"))
    return next(filter(None, ids), "")
