"""One row per question and method, on disk as soon as it is known, so that a run can resume."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from blocktune.data import RagExample
from blocktune.evaluation.files import replace_text
from blocktune.evaluation.metrics import extract_answer, score
from blocktune.evaluation.suite import MethodSpec, TaskSpec


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
        account: Context tokens, tokens recomputed per layer, cache hits and misses.
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


def row_key(method: MethodSpec, task: TaskSpec, example: RagExample, fingerprint: str) -> str:
    """Digest of weights, method, decoding and question: equal keys mean equal answers.

    Args:
        method: What answers; its label and the adapter's path do not count.
        task: How the answer is decoded and scored.
        example: The question with its chunks and accepted answers.
        fingerprint: Of the weights, tokenizer, prompt format and dtype; see `Engine`.
    """
    parts = {
        "method": [method.name, dict(method.params)],
        "task": [task.name, task.answer_marker, task.max_new_tokens],
        "example": example.to_json(),
        "weights": fingerprint,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def make_row(key: str, task: TaskSpec, example: RagExample, name: str, answer: Any) -> Row:
    """Scores an `Answer` of the engine; ``name`` identifies a question that has no id."""
    account = answer.account
    extracted = extract_answer(answer.text, task.answer_marker)
    counted = ("context_tokens", "layer_tokens", "bytes_read", "chunk_hits", "chunk_misses")
    return Row(
        key=key,
        task=task.name,
        id=example.id or name,
        kind=example.kind,
        prediction=answer.text,
        answer=extracted,
        **score(extracted, example.answers)._asdict(),
        recompute_ratio=account.recompute_ratio,
        account={field: getattr(account, field) for field in counted},
    )


class RowFile:
    """The rows of one method: a JSONL file that only grows while a run lasts.

    Opening it keeps the rows of this run, drops those of another one (other weights, other
    questions), and a last line that a stopped run left half-written.

    Args:
        path: The file; made with its folder when it does not exist.
        keys: `row_key` of every row of this run, in order.
    """

    def __init__(self, path: Path, keys: Iterable[str]):
        self._path, self._keys = path, list(keys)
        path.parent.mkdir(parents=True, exist_ok=True)
        wanted = set(self._keys)
        self._rows = {row.key: row for row in _read(path) if row.key in wanted}
        replace_text(path, "".join(map(_line, self._rows.values())))

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows and hands them to the operating system before it returns."""
        new = [row for row in rows if row.key not in self._rows]
        with self._path.open("a", encoding="utf-8") as out:
            out.write("".join(map(_line, new)))
        self._rows |= {row.key: row for row in new}

    def rows(self) -> list[Row]:
        """All rows in the order of the questions; a `KeyError` if one is not answered yet."""
        return [self._rows[key] for key in self._keys]


def _line(row: Row) -> str:
    return json.dumps(asdict(row), ensure_ascii=False) + "\n"


def _read(path: Path) -> Iterable[Row]:
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            return  # the run was stopped while it wrote this line
        try:
            yield Row(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a row of this version ({error}); move it away"
            ) from None
