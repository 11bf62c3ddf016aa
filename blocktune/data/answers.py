"""Answer matching, and regenerating training answers with a model.

Training on answers in the base model's own words, instead of those of the data set, preserves its
other abilities. Block-Attention and KVLink used answers of a larger model.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unicodedata import category, normalize

from blocktune.data.example import RagExample, write_jsonl
from blocktune.files import append_lines, resumed
from blocktune.prompt.format import Chunk

UNSPACED = "\u3040-\u30ff\u3400-\u9fff"
"""Chinese and Japanese characters, for a regular expression; each counts as a word."""
MARKS = "".join(c for c in map(chr, range(0x300, 0xAC00)) if category(c) in ("Mn", "Mc"))
LATER = rf"(?:[{MARKS}]+[^\W{UNSPACED}]*)*"
"""The rest of a word after its first mark: \\w has no vowel signs, as of Hindi, Thai or Arabic."""
_WORDS = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+{LATER}")


def mentions(text: str, answers: Iterable[str]) -> bool:
    """Whether a text contains the words of an answer, in order; ignores case and punctuation."""
    padded = f" {_normalize(text)} "
    return any(f" {words} " in padded for words in map(_normalize, answers) if words)


def gives_answer(reply: str, answers: Iterable[str]) -> bool:
    """Whether a reply mentions an answer, or starts with it if the answer is yes or no."""
    verdicts, others = _split_verdicts(answers)
    first, _, _ = _normalize(reply).partition(" ")
    return first in verdicts or mentions(reply, others)


def holds_answer(example: RagExample, whole: RagExample | None = None) -> bool:
    """Whether a chunk of an example mentions an answer other than yes or no.

    Yes or no can be answered if the example still has all supporting chunks of ``whole``, the same
    question with all chunks of its source.
    """
    verdicts, others = _split_verdicts(example.answers)
    supported = whole is not None and len(example.supporting) == len(whole.supporting) > 0
    mentioned = any(chunk_mentions(chunk, others) for chunk in example.chunks)
    return mentioned or (bool(verdicts) and supported)


def is_verdict(example: RagExample) -> bool:
    """Whether one of the accepted answers is yes or no."""
    return bool(_split_verdicts(example.answers)[0])


def chunk_mentions(chunk: Chunk, answers: Iterable[str]) -> bool:
    """Whether a chunk's title or text mentions an answer."""
    return mentions(f"{chunk.title or ''}\n{chunk.text}", answers)


def evidence(example: RagExample) -> frozenset[int]:
    """Indices of the chunks that must not be dropped.

    These are the supporting chunks, else those that mention an answer other than yes or no, else
    all.
    """
    if example.supporting:
        return frozenset(example.supporting)
    _, others = _split_verdicts(example.answers)
    found = [i for i, chunk in enumerate(example.chunks) if chunk_mentions(chunk, others)]
    return frozenset(found or range(len(example.chunks)))


def _split_verdicts(answers: Iterable[str]) -> tuple[set[str], list[str]]:
    answers = list(answers)
    verdicts = {_normalize(answer) for answer in answers} & {"yes", "no"}
    return verdicts, [answer for answer in answers if _normalize(answer) not in verdicts]


def _normalize(text: str) -> str:
    return " ".join(_WORDS.findall(normalize("NFC", text).casefold()))


def regenerate(
    examples: Sequence[RagExample],
    answer: Callable[[Sequence[RagExample], int], Sequence[str | None]],
    output: str | Path,
    *,
    facts: Mapping[str, Any],
    batch_size: int,
    only_correct: bool = False,
    on_batch: Callable[[int], None] = lambda done: None,
) -> dict[str, int]:
    """Writes the examples with the model's answers as their ``response``.

    Answers are appended to ``OUTPUT.part`` after each batch; ``OUTPUT`` is created at the end. If
    interrupted, the same call continues after the last complete batch, with the same result.

    ``answer`` answers a batch, given its number, which seeds the sampling. An answer that was cut
    at the limit of tokens is None: training on it would teach to stop there. ``facts`` (model,
    decoding) also determine the answers, and are recorded in ``meta``. With ``only_correct``,
    replies without an accepted answer are dropped, see `gives_answer`. ``on_batch`` is called with
    the number of examples done.

    Returns how many examples were ``written``, how many answers an interrupted run had
    (``resumed``), and how many were dropped (``empty``, ``wrong``, ``cut``). Raises ValueError if
    the part file was started with other examples, ``facts`` or ``batch_size``, an example has no
    accepted answer to compare with, or no answer is left to write.
    """
    if only_correct and (unknown := [e.id or e.question for e in examples if not e.answers]):
        raise ValueError(f"only_correct needs answers; example '{unknown[0]:.40}' has none")
    output = Path(output)
    if output.is_dir():
        raise ValueError(f"'{output}' is a folder; name a file")
    part = output.with_name(output.name + ".part")
    identity = [[example.to_json() for example in examples], dict(facts), batch_size]
    identity_json = json.dumps(identity, sort_keys=True, ensure_ascii=False, default=str)
    header = json.dumps({"key": hashlib.sha256(identity_json.encode()).hexdigest()})
    with resumed(part) as lines:
        if not lines:
            append_lines(part, [header])
        elif lines[0] != header:
            raise ValueError(
                f"'{part}' is of other questions, model or options; repeat its command or remove it"
            )
        answers = [text for line in lines[1:] for text in json.loads(line)]
        num_resumed = len(answers)
        on_batch(num_resumed)
        for start in range(num_resumed, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            texts = list(answer(batch, start // batch_size))
            if len(texts) != len(batch):
                raise RuntimeError(f"{len(batch)} questions got {len(texts)} answers")
            append_lines(part, [json.dumps(texts, ensure_ascii=False)])
            answers += texts
            on_batch(len(answers))
    fates = [_fate(e, text, only_correct) for e, text in zip(examples, answers, strict=True)]
    dropped = {fate: fates.count(fate) for fate in ("empty", "wrong", "cut")}
    written = [
        replace(e, response=text.strip(), meta=e.meta | {"answered_by": dict(facts)})
        for e, text, fate in zip(examples, answers, fates, strict=True)
        if fate == "written"
    ]
    if not written:
        counts = ", ".join(f"{count} are {name}" for name, count in dropped.items())
        counts += "; allow more new tokens" if dropped["cut"] else ""
        raise ValueError(f"nothing to write to {output.name}: of {len(answers)} answers, {counts}")
    write_jsonl(output, written)
    part.unlink()
    return {"written": len(written), "resumed": num_resumed, **dropped}


def _fate(example: RagExample, text: str | None, only_correct: bool) -> str:
    if text is None:
        return "cut"
    if not text.strip():
        return "empty"
    return "wrong" if only_correct and not gives_answer(text, example.answers) else "written"
