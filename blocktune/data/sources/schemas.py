"""Records of public multi-hop sets, each turned into a `RagExample`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from blocktune.data.example import RagExample, field_error
from blocktune.prompt.format import Chunk


class LeftOut(Exception):
    """A row that the source is known to hold and that cannot be asked; says why."""


def parse_musique(record: Mapping[str, Any]) -> RagExample:
    """MuSiQue: 20 paragraphs, the hops in the id (``'3hop1__...'``).

    Source: https://github.com/StonyBrookNLP/musique, ``musique_*_v1.0_*.jsonl``.
    """
    if record.get("answerable") is False:
        raise LeftOut("not answerable from its paragraphs")
    hops = len(record.get("question_decomposition") or ())
    named = re.match(r"(\d+)hop", str(record.get("id", "")))
    hops = int(named[1]) if named else hops
    passages = [
        _Passage(p.get("title"), p.get("paragraph_text"), bool(p.get("is_supporting")))
        for p in _items(record, "paragraphs", Mapping, '{"title", "paragraph_text"}')
    ]
    answers = [record.get("answer"), *(record.get("answer_aliases") or ())]
    return _example(record, passages, answers, kind=f"{hops}-hop" if hops else "")


def parse_wiki(record: Mapping[str, Any]) -> RagExample:
    """HotpotQA and 2WikiMultihopQA, as released (lists) and as on the Hub (dicts of lists).

    Of the same fields, passages may also be objects, ``{"title", "text" or "sentences"}``, and
    plain strings. Rows without a context are known in 2WikiMultihopQA extracts and left out.

    Source: https://hotpotqa.github.io, https://github.com/Alab-NII/2wikimultihop.
    """
    if not record.get("context"):
        raise LeftOut("no context")
    titles = _supporting_titles(record)
    passages = [_Passage(title, text, title in titles) for title, text in _documents(record)]
    return _example(record, passages, [record.get("answer")], kind=record.get("type") or "")


def parse_ctxs(record: Mapping[str, Any]) -> RagExample:
    """CacheBlend's and FiD's ``ctxs``.

    Source: https://github.com/YaoJiayi/CacheBlend, ``inputs/``.
    """
    passages = [
        _Passage(c.get("title"), c.get("text"), False)
        for c in _items(record, "ctxs", Mapping, '{"title", "text"}')
    ]
    answers = record.get("answers")
    if not isinstance(answers, list):
        raise field_error("answers", "a list of strings", answers)
    return _example(record, passages, answers, kind=record.get("type") or "")


class _Passage(NamedTuple):
    title: Any
    text: Any
    supporting: bool


def _supporting_titles(record: Mapping[str, Any]) -> list[str]:
    facts = record.get("supporting_facts") or ()
    try:
        if isinstance(facts, Mapping):
            return list(facts["title"])
        return [fact["title"] if isinstance(fact, Mapping) else fact[0] for fact in facts]
    except (KeyError, TypeError, IndexError):
        wanted = 'a list of [title, sentence] or {"title"}'
        raise field_error("supporting_facts", wanted, facts) from None


def _documents(record: Mapping[str, Any]) -> list[tuple[str | None, str]]:
    """Titles and texts of a context, which is a list of passages or an object of lists."""
    context = record["context"]
    if isinstance(context, Mapping):
        columns = [context.get("title"), context.get(_text_key(context) or "")]
        alike = all(isinstance(column, list) for column in columns)
        if not alike or len({len(column) for column in columns}) != 1:
            raise field_error("context", 'an object of lists "title", "sentences"', context)
        context = list(zip(*columns, strict=True))
    if not isinstance(context, list):
        raise field_error("context", "a list of passages", context)
    return [_document(index, entry) for index, entry in enumerate(context)]


def _document(index: int, entry: Any) -> tuple[str | None, str]:
    """``[title, text]``, ``{"title"?, "text"}`` or the text; sentences for text everywhere."""
    title, text = None, entry
    if isinstance(entry, Mapping):
        title, text = entry.get("title"), entry.get(_text_key(entry) or "")
    elif isinstance(entry, list | tuple):
        title, text = entry if len(entry) == 2 else (None, None)
    if isinstance(text, list) and all(isinstance(sentence, str) for sentence in text):
        text = " ".join(sentence.strip() for sentence in text)
    if not isinstance(text, str) or not isinstance(title, str | None):
        wanted = '[title, [sentences]], {"title", "text" or "sentences"} or a string'
        raise field_error(f"context[{index}]", wanted, entry)
    return title, text


def _text_key(entry: Mapping[str, Any]) -> str | None:
    return next((key for key in ("sentences", "content", "text") if key in entry), None)


def not_blank(answers: Iterable[Any]) -> tuple[Any, ...]:
    """Answers, each once, without the blank aliases that public sets hold; all blank, all stay."""
    once: list[Any] = []
    for answer in answers:
        if answer not in once:
            once.append(answer)
    said = [answer for answer in once if not (isinstance(answer, str) and not answer.strip())]
    return tuple(said or once)


def _items(record: Mapping[str, Any], name: str, kind: type, wanted: str) -> list[Any]:
    value = record.get(name)
    if not isinstance(value, list) or not value or not all(isinstance(v, kind) for v in value):
        raise field_error(name, f"a non-empty list of {wanted}", value)
    return value


def _example(
    record: Mapping[str, Any], passages: list[_Passage], answers: list[Any], kind: str
) -> RagExample:
    """Builds the example; a blank passage has nothing to encode and is counted in ``meta``."""
    full = [p for p in passages if not (isinstance(p.text, str) and not p.text.strip())]
    if not full:
        raise LeftOut("no passage with text")
    blank = len(passages) - len(full)
    return RagExample(
        question=record.get("question"),
        chunks=tuple(Chunk(p.text, p.title) for p in full),
        answers=not_blank(answers),
        kind=kind,
        id=str(record.get("_id") or record.get("id") or ""),
        supporting=tuple(index for index, p in enumerate(full) if p.supporting),
        meta={"blank_passages": blank} if blank else {},
    )
