"""One row per question and method: what was asked, answered, scored and spent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from blocktune.data import RagExample
from blocktune.evaluation.code import code_digest
from blocktune.evaluation.metrics import METRICS, extract_answer, score
from blocktune.evaluation.suite import MethodSpec
from blocktune.evaluation.task import TaskSpec


@dataclass(frozen=True)
class Row:
    """What one method answered to one question.

    Attributes:
        key: Digest of all that decides the answer; see `row_key`.
        task: The task's name.
        id: The question's identifier in its source, or its number.
        kind: Its kind, e.g. ``2-hop``.
        prediction: What the model wrote.
        answer: What of it is scored.
        em: Exact match, 0 or 1.
        f1: Word F1.
        substring_em: Substring match, 0 or 1.
        recompute_ratio: Share of context tokens recomputed, over all layers.
        account: Everything that `Account` counts; no times.
        score: The task's headline metric.
        scores: Its further metrics, by name.
        prompt_hash: Digest of the prompt's token ids.
        place: Where the evidence stands among the chunks, from 0 (first) to 1 (last), or None.
    """

    key: str
    task: str
    id: str
    kind: str
    prediction: str
    answer: str
    em: float
    f1: float
    substring_em: float
    recompute_ratio: float
    account: Mapping[str, Any]
    score: float
    scores: Mapping[str, float] = field(default_factory=dict)
    prompt_hash: str = ""
    place: float | None = None


def row_key(method: MethodSpec, task: TaskSpec, example: RagExample, fingerprint: str) -> str:
    """Digest of weights, method, code, wording, decoding and question: equal keys, equal rows.

    Args:
        method: What answers; its label and the adapter's path do not count.
        task: How the answer is asked, decoded and scored.
        example: The question with its chunks and accepted answers.
        fingerprint: Of the weights, tokenizer, prompt format and dtype; see `Engine`.
    """
    entry = method.entry()
    if "preset" in entry:  # then the name is but a label
        del entry["name"]
    parts = {
        "method": entry,
        "task": task.decides(),
        "example": example.to_json(),
        "weights": fingerprint,
        "code": code_digest(),
    }
    return digest_of(parts)


def make_row(
    key: str, task: TaskSpec, example: RagExample, name: str, answer: Any, engine: Any, method: Any
) -> Row:
    """Scores an `Answer` of the engine; ``name`` identifies a question that has no id."""
    account = answer.account
    extracted = extract_answer(task.cut(answer.text), task.answer_marker)
    scores = scores_of(task, answer.text, example, engine.tokenizer)
    return Row(
        key=key,
        task=task.name,
        id=example.id or name,
        kind=example.kind,
        prediction=answer.text,
        answer=extracted,
        **score(extracted, example.answers)._asdict(),
        recompute_ratio=account.recompute_ratio,
        account={
            f.name: getattr(account, f.name)
            for f in fields(account)
            if not f.name.startswith("ttft")
        },
        score=scores[task.metric],
        scores={metric: scores[metric] for metric in task.metrics},
        prompt_hash=prompt_hash(engine, method, example),
        place=place_of(example),
    )


def scores_of(task: TaskSpec, text: str, example: RagExample, tokenizer: Any) -> dict[str, float]:
    """The task's headline metric and its further ones, of one output."""
    scored = task.cut(text)
    names = dict.fromkeys((task.metric, *task.metrics))
    return {name: METRICS[name].score(scored, example.answers, tokenizer) for name in names}


def prompt_hash(engine: Any, method: Any, example: RagExample) -> str:
    """Digest of the token ids that the method reads: prefix, chunks and question."""
    return digest_of(engine.prompts.pieces(example, method)[:3])


def place_of(example: RagExample) -> float | None:
    """Mean place of the supporting chunks, 0 for the first and 1 for the last chunk."""
    last = len(example.chunks) - 1
    if not example.supporting or last == 0:
        return None
    return sum(example.supporting) / len(example.supporting) / last


def digest_of(value: Any) -> str:
    """Sixteen hexadecimal digits that stand for a JSON value."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
