"""Converters of question-answering records, in the formats of public data sets, to examples."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.data.chunking import Chunker, Message, chunks_of
from blocktune.data.example import (
    RagExample,
    answers_of,
    as_id,
    chunk_fields,
    field_error,
    passages_in,
    read_chunks,
)
from blocktune.data.sources.records import LeftOut
from blocktune.prompt.format import Chunk

PASSAGES = ("ctxs", "passages", "contexts", "retrieved_contexts", "documents", "docs")
"""Fields that may hold a question's passages, besides blocktune's own ``chunks``."""
SUMMARIZE = "Write a short summary of the text above."

CHOICES = ("choice_A", "choice_B", "choice_C", "choice_D")
"""Fields of LongBench v2."""
_NUMBERED = re.compile(r"^(?=Passage \d+:\n)", re.MULTILINE)
"""How LongBench joins the passages of its multi-document tasks."""


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
    if record.get("is_impossible") is True and not record.get("response"):
        raise LeftOut("marked as impossible to answer")
    if cutter is not None:
        chunks = record.get("chunks")
        if not isinstance(chunks, str):
            raise ValueError("records have chunks already; leave the chunker out")
        record = {**record, "chunks": chunks_of(cutter.text(chunks))}
    return RagExample.from_json(record)


def parse_musique(record: Mapping[str, Any]) -> RagExample:
    """Converts MuSiQue: 20 paragraphs; the id gives the number of hops (``'3hop1__...'``).

    Source: https://github.com/StonyBrookNLP/musique, ``musique_*_v1.0_*.jsonl``.
    """
    if record.get("answerable") is False:
        raise LeftOut("not answerable from its paragraphs")
    match = re.match(r"(\d+)hop", str(record.get("id", "")))
    hops = int(match[1]) if match else len(record.get("question_decomposition") or ())
    return _example(record, "paragraphs", kind=f"{hops}-hop" if hops else "")


def parse_wiki(record: Mapping[str, Any], cutter: Cutter | None = None) -> RagExample:
    """Converts HotpotQA and 2WikiMultihopQA, original or from the Hub, and SQuAD from the Hub.

    ``context`` is one text, or passages in any form that `RagExample` reads. Some copies of
    2WikiMultihopQA have rows without a context, which are left out.

    Source: https://hotpotqa.github.io, https://github.com/Alab-NII/2wikimultihop.
    """
    context = record.get("context")
    if not (any(context.values()) if isinstance(context, Mapping) else context):
        raise LeftOut("no context")
    if isinstance(context, str):
        spans = cutter.text(context) if cutter else [context]
        record = {**record, "context": [{"title": record.get("title"), "text": s} for s in spans]}
    elif cutter:
        raise ValueError("records have chunks already; leave the chunker out")
    return _example(record, "context", str(record.get("type") or ""), _supporting_titles(record))


def parse_ctxs(record: Mapping[str, Any]) -> RagExample:
    """Converts a question with `PASSAGES`: CacheBlend's and FiD's ``ctxs``, RAGAS' ``contexts``.

    A record with other fields of blocktune's own format is one, except for the name of its chunks.

    Source: https://github.com/YaoJiayi/CacheBlend, ``inputs/``.
    """
    name = next((name for name in PASSAGES if record.get(name) is not None), PASSAGES[0])
    if any(record.get(key) is not None for key in ("response", "kind", "supporting", "followups")):
        return parse_own({**record, name: None, "chunks": record.get(name)})
    return _example(record, name, kind=str(record.get("type") or ""))


def parse_ragas(record: Mapping[str, Any]) -> RagExample:
    """Converts RAGAS' single-turn samples. The answer is ``reference``, not ``response``.

    Source: https://docs.ragas.io, ``SingleTurnSample``.
    """
    renamed = {"question": record["user_input"], "answers": record.get("reference")}
    return _example({**record, **renamed}, "retrieved_contexts", kind="")


def parse_longbench(record: Mapping[str, Any], cutter: Cutter) -> RagExample:
    """Converts LongBench, its v2 and InfiniteBench: a question over one long text, ``context``.

    The context is split at its numbered passages, else by the cutter. Summarisation tasks have a
    blank question, which becomes `SUMMARIZE`. Choices follow the question, ``(B) Kirby`` a line.

    Source: LongBench, arXiv:2308.14508; v2, arXiv:2412.15204.
    """
    context, question = record.get("context"), record.get("input", record.get("question"))
    if not isinstance(context, str) or not isinstance(question, str):
        raise field_error("context", 'a text, as "input" is', context)
    if not context.strip():
        raise LeftOut("no context")
    spans = [span for span in _NUMBERED.split(context) if span.strip()]
    chunks = chunks_of(spans if len(spans) > 1 else cutter.text(context))
    question, answers = question if question.strip() else SUMMARIZE, answers_of(record)
    choices = record.get("options") or [record[key] for key in CHOICES if key in record]
    if choices:
        pairs = zip("ABCD", choices, strict=False)
        lines = {f"({letter}) {text}": {letter, text} for letter, text in pairs}
        question = "\n".join([question, "Choices:", *lines])
        right = tuple(line for line, names in lines.items() if names & set(answers))
        if answers and not right:
            raise field_error("answer", f"one of its choices, {' '.join(lines)}", answers[0])
        answers = right
    known = ("input", "question", "context", "answers", "answer", "id", "_id", "options", *CHOICES)
    return RagExample(
        question=question,
        chunks=chunks,
        answers=answers,
        kind=str(record.get("dataset") or ""),
        id=id_of(record),
        meta={k: v for k, v in record.items() if k not in known and v is not None},
    )


def parse_trivia(record: Mapping[str, Any], cutter: Cutter) -> RagExample:
    """Converts TriviaQA ``rc``. The chunks are all its evidence pages, split by the cutter.

    ``blocktune data passages`` can select the best chunks.

    Source: TriviaQA, arXiv:1705.03551, as on the Hub.
    """
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


def _supporting_titles(record: Mapping[str, Any]) -> list[str]:
    facts = record.get("supporting_facts") or ()
    try:
        if isinstance(facts, Mapping):
            return list(facts["title"])
        return [fact["title"] if isinstance(fact, Mapping) else fact[0] for fact in facts]
    except (KeyError, TypeError, IndexError):
        wanted = 'a list of [title, sentence] or {"title"}'
        raise field_error("supporting_facts", wanted, facts) from None


def _example(
    record: Mapping[str, Any], name: str, kind: str, supporting: Collection[str] = ()
) -> RagExample:
    """Builds an example from the passages in the field ``name``.

    Drops blank passages and counts them in ``meta``. ``supporting`` holds titles of supporting
    passages, in addition to passages with ``is_supporting``.
    """
    entries = passages_in(record.get(name), name)
    passages = [chunk_fields(entry, f"{name}[{i}]") for i, entry in enumerate(entries)]
    kept = [p for p in passages if not (isinstance(p["text"], str) and not p["text"].strip())]
    if entries and not kept:
        raise LeftOut("no passage with text")
    blank = len(passages) - len(kept)
    chunks = read_chunks(kept, name)
    return RagExample(
        question=record.get("question"),
        chunks=chunks,
        answers=answers_of(record),
        kind=kind,
        id=id_of(record),
        supporting=tuple(
            index
            for index, chunk in enumerate(chunks)
            if chunk.title in supporting or chunk.metadata.get("is_supporting")
        ),
        meta={"blank_passages": blank} if blank else {},
    )


def id_of(record: Mapping[str, Any]) -> str:
    """The identifier of a record, or an empty string."""
    ids = (str(as_id(record.get(key))) for key in ("id", "_id", "question_id"))
    return next(filter(None, ids), "")
