"""Answers: whether a text contains an accepted one, and answers rewritten by a model.

Training on the base model's own words rather than the data set's preserves its other abilities;
Block-Attention and KVLink used a larger model's words.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from blocktune.data.example import RagExample, write_jsonl
from blocktune.files import append_lines, replacing, resumed
from blocktune.prompt.format import Chunk

VERDICTS = ("yes", "no")

_WORDS = re.compile(r"\w+")


def mentions(text: str, answers: Iterable[str]) -> bool:
    """Whether the text contains the words of an answer, in order, in any case."""
    padded = f" {_plain(text)} "
    return any(f" {words} " in padded for words in map(_plain, answers) if words)


def gives_answer(reply: str, answers: Iterable[str]) -> bool:
    """Whether a reply mentions an answer, or starts with it if the answer is yes or no."""
    verdicts, named = _apart(answers)
    first, _, _ = _plain(reply).partition(" ")
    return first in verdicts or mentions(reply, named)


def holds_answer(example: RagExample, whole: RagExample | None = None) -> bool:
    """Whether an example's chunks can give an answer.

    They mention it; or it is yes or no, and all chunks that support it in ``whole``, the question
    with all chunks of its source, are among them.
    """
    verdicts, named = _apart(example.answers)
    if any(chunk_mentions(chunk, named) for chunk in example.chunks):
        return True
    supported = whole is not None and len(example.supporting) == len(whole.supporting) > 0
    return bool(verdicts) and supported


def is_verdict(example: RagExample) -> bool:
    """Whether an answer is yes or no."""
    return bool(_apart(example.answers)[0])


def chunk_mentions(chunk: Chunk, answers: Iterable[str]) -> bool:
    """Whether a chunk's title or text mentions an answer."""
    return mentions(f"{chunk.title or ''}\n{chunk.text}", answers)


def evidence(example: RagExample) -> frozenset[int]:
    """Indices of chunks that must not be dropped.

    The supporting ones, else those that mention an answer other than yes and no, else all.
    """
    if example.supporting:
        return frozenset(example.supporting)
    _, named = _apart(example.answers)
    found = frozenset(
        index for index, chunk in enumerate(example.chunks) if chunk_mentions(chunk, named)
    )
    return found or frozenset(range(len(example.chunks)))


def _apart(answers: Iterable[str]) -> tuple[set[str], list[str]]:
    """Answers that are yes or no, and all others."""
    answers = list(answers)
    verdicts = {_plain(answer) for answer in answers} & set(VERDICTS)
    return verdicts, [answer for answer in answers if _plain(answer) not in VERDICTS]


def _plain(text: str) -> str:
    return " ".join(_WORDS.findall(text.casefold()))


Answerer = Callable[[Sequence[RagExample], int], Sequence[str]]
"""From a batch and its number to one answer each; the number seeds what is drawn."""


@dataclass(frozen=True)
class Regenerated:
    """Counts: examples written, answers of an earlier run, and those left out, empty or wrong."""

    written: int
    resumed: int
    empty: int
    wrong: int


def regenerate(
    examples: Sequence[RagExample],
    answer: Answerer,
    output: str | Path,
    *,
    facts: Mapping[str, Any],
    batch_size: int,
    only_correct: bool = False,
    on_batch: Callable[[int], None] = lambda done: None,
) -> Regenerated:
    """Writes the examples with the model's answers as their ``response``.

    Answers are kept in ``OUTPUT.part`` a batch at a time; the same command continues after the last
    whole batch and writes the same file as an uninterrupted run. ``OUTPUT`` appears at the end.

    ``facts`` are all else that decides the answers (model, decoding): they and ``batch_size`` must
    be the same when a run is continued, and ``meta`` records them. ``only_correct`` leaves out what
    gives no accepted answer, see `gives_answer`. ``on_batch`` is told how many examples are done.

    Raises:
        ValueError: If the part was started by another command, an example has no accepted answer
            to compare with, or no answer can be kept.
    """
    for example in examples if only_correct else ():
        if not example.answers:
            name = example.id or example.question
            raise ValueError(
                f"example '{name:.40}' has no accepted answer to compare with; omit only_correct "
                "or give it 'answers'"
            )
    output = Path(output)
    if output.is_dir():
        raise ValueError(f"'{output}' is a folder; name a file")
    part = output.with_name(output.name + ".part")
    record = [[example.to_json() for example in examples], dict(facts), batch_size]
    text = json.dumps(record, sort_keys=True, ensure_ascii=False)
    header = json.dumps({"key": hashlib.sha256(text.encode()).hexdigest()})
    with resumed(part) as lines:
        if not lines:
            append_lines(part, [header])
        elif lines[0] != header:
            raise ValueError(
                f"{part.name} was started with other questions, model or decoding; repeat "
                f"that command, or remove '{part}' to start over"
            )
        answers = [text for line in lines[1:] for text in json.loads(line)]
        before = len(answers)
        on_batch(before)
        for start in range(before, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            texts = list(answer(batch, start // batch_size))
            if len(texts) != len(batch):
                raise RuntimeError(f"{len(batch)} questions got {len(texts)} answers")
            append_lines(part, [json.dumps(texts, ensure_ascii=False)])
            answers += texts
            on_batch(len(answers))
    written, empty, wrong = [], 0, 0
    for example, text in zip(examples, answers, strict=True):
        if not text.strip():
            empty += 1
        elif only_correct and not gives_answer(text, example.answers):
            wrong += 1
        else:
            meta = example.meta | {"answered_by": dict(facts)}
            written.append(replace(example, response=text.strip(), meta=meta))
    if not written:
        raise ValueError(
            f"nothing to write to {output.name}: of {len(answers)} answers {empty} are empty and "
            f"{wrong} mention no accepted one"
        )
    with replacing(output) as temporary:
        write_jsonl(temporary, written)
    part.unlink()
    return Regenerated(len(written), before, empty, wrong)
