"""One row per question and method, written at once, so that a stopped run can resume."""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import blocktune
from blocktune.data import RagExample
from blocktune.evaluation.metrics import METRICS, extract_answer
from blocktune.evaluation.suite import MethodSpec, TaskSpec
from blocktune.files import append_lines, replace_text, truncate_lines, whole_lines

EVERY = ("em", "f1", "substring_em")  # metrics that every row has, of the extracted answer


@dataclass(frozen=True)
class Row:
    """What one method answered to one question."""

    key: str  # digest of everything that decides the answer; see `row_key`
    task: str  # the task's name
    id: str  # the question's identifier in its source, or its number
    kind: str  # its kind, e.g. ``2-hop``
    prediction: str  # what the model wrote
    answer: str  # what of it is scored
    em: float  # exact match, 0 or 1
    f1: float  # word F1
    substring_em: float  # substring match, 0 or 1
    recompute_ratio: float  # share of context tokens recomputed, over all layers
    usage: Mapping[str, Any]  # everything that `Usage` counts; no times
    score: float  # the task's headline metric
    scores: Mapping[str, float] = field(default_factory=dict)  # its further metrics, by name
    prompt_hash: str = ""  # digest of the token ids that the method read: prefix, chunks, question
    place: float | None = None  # mean place of the evidence, 0 (first chunk) to 1 (last)


PARTS = ("layout.py", "links.py", "registry.py", "models", "positions", "attention", "prompt")
PARTS += ("cache", "methods", "engine", "evaluation/metrics.py", "evaluation/rows.py")
"""What decides an output or its score; commands, training and reports do not."""


@cache
def code_digest() -> str:
    """Version and digest of the code that decides rows, such as ``0.1.0-3f2a91c05d7e``.

    A commit would be too coarse (a changed README is a new commit) and too fine (uncommitted work
    has none): rows of other code are dropped, and only those.
    """
    root = Path(blocktune.__file__).parent
    digest = hashlib.sha256()
    for part in PARTS:
        own = [root / part] if part.endswith(".py") else (root / part).rglob("*.py")
        for path in sorted(own):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{blocktune.__version__}-{digest.hexdigest()[:12]}"


def row_key(method: MethodSpec, task: TaskSpec, example: RagExample, fingerprint: str) -> str:
    """Digest of weights, method, code, wording, decoding and question: equal keys, equal rows.

    The method's label and the adapter's path do not count. ``fingerprint`` is that of `Engine`: of
    weights, tokenizer, prompt format and dtype.
    """
    entry = method.entry()
    if "preset" in entry:  # then the name is but a label
        del entry["name"]
    parts = {"method": entry, "task": task.decides(), "example": example.to_json()}
    return digest_of(parts | {"weights": fingerprint, "code": code_digest()})


def make_row(
    key: str, task: TaskSpec, example: RagExample, name: str, answer: Any, engine: Any, method: Any
) -> Row:
    """Scores an `Answer` of the engine; ``name`` identifies a question that has no id."""
    usage = {k: v for k, v in vars(answer.usage).items() if not k.startswith("ttft")}
    extracted = extract_answer(task.cut(answer.text), task.answer_marker)
    scores = scores_of(task, answer.text, example, engine.tokenizer)
    return Row(
        key=key,
        task=task.name,
        id=example.id or name,
        kind=example.kind,
        prediction=answer.text,
        answer=extracted,
        **{metric: METRICS[metric].score(extracted, example.answers, None) for metric in EVERY},
        recompute_ratio=answer.usage.recompute_ratio,
        usage=usage,
        score=scores[task.metric],
        scores={metric: scores[metric] for metric in task.metrics},
        prompt_hash=digest_of(engine.prompts.pieces(example, method)[:3]),
        place=place_of(example),
    )


def scores_of(task: TaskSpec, text: str, example: RagExample, tokenizer: Any) -> dict[str, float]:
    """The task's headline metric and its further ones, of one output."""
    names, scored = {task.metric, *task.metrics}, task.cut(text)
    return {name: METRICS[name].score(scored, example.answers, tokenizer) for name in names}


def place_of(example: RagExample) -> float | None:
    """Mean place of the supporting chunks, 0 for the first and 1 for the last chunk."""
    last = len(example.chunks) - 1
    if not example.supporting or last == 0:
        return None
    return sum(example.supporting) / len(example.supporting) / last


def digest_of(value: Any) -> str:
    """The first sixteen hexadecimal digits of a JSON value's SHA-256."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


ROWS = "rows"


class RowFile:
    """The rows of one method, ``LABEL.jsonl``; while a run lasts, a part for each process.

    Opening only reads: rows of another run (other weights, questions, code) are left out, and so is
    a last line that a stopped run left half-written. All processes of a run must have opened before
    one of them appends. ``keys`` has the `row_key` of every row of this run, in order.
    """

    def __init__(self, folder: Path, label: str, keys: Iterable[str], rank: int = 0):
        self.path, self.keys = folder / f"{label}.jsonl", list(keys)
        self._part = folder / f"{label}.part{rank}.jsonl"
        self._rows, self._begun = self._known(), False

    def refuse_loss(self, asked: Collection[tuple[str, str]]) -> None:
        """Raises ValueError if it answers questions, by task and id, that are not ``asked``.

        `merge` would drop those; an outdated answer to a question that is asked it may replace.
        """
        found = {(row.task, row.id) for path in self._paths() for row in read_rows(path)}
        if lost := found - set(asked):
            raise ValueError(
                f"'{self.path}' has answers to {len(lost)} questions that this run does not ask, "
                f"such as {min(lost)[1]!r}, and would lose them; give another output folder, or "
                "move this one away"
            )

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows to this process's part, on disk before it returns."""
        if not self._begun:  # what an earlier run left there, without its half-written line
            truncate_lines(self._part, len(whole_lines(self._part)))
            self._begun = True
        new = {row.key: row for row in rows if row.key not in self._rows}
        append_lines(self._part, map(_line, new.values()))
        self._rows |= new

    def merge(self) -> list[Row]:
        """Joins all parts into one file in the order of the questions, and returns its rows.

        Only one process may call it, when all have ended. A KeyError if a question has no row.
        """
        known = self._known()
        rows = [known[key] for key in self.keys]
        replace_text(self.path, "".join(_line(row) + "\n" for row in rows))
        for part in self._paths()[1:]:
            part.unlink()
        return rows

    def _known(self) -> dict[str, Row]:
        rows, wanted = (row for path in self._paths() for row in read_rows(path)), set(self.keys)
        return {row.key: row for row in rows if row.key in wanted}

    def _paths(self) -> list[Path]:
        """The file and its parts."""
        parts = self.path.parent.glob(f"{glob.escape(self.path.stem)}.part*.jsonl")
        return [self.path, *sorted(parts)]


def read_all(folder: Path, labels: Sequence[str]) -> dict[str, list[Row]]:
    """The rows of a finished run by label; raises ValueError if a label has none there."""
    found = {label: list(read_rows(folder / ROWS / f"{label}.jsonl")) for label in labels}
    if missing := [label for label, rows in found.items() if not rows]:
        raise ValueError(f"no rows of '{missing[0]}' in '{folder / ROWS}'; finish the run first")
    return found


def read_rows(path: Path) -> Iterator[Row]:
    """Whole lines of a file as rows; raises ValueError if one is not a row."""
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            yield Row(**json.loads(line))
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(
                f"{path}, line {number}: not a row of this version ({error}); move it away"
            ) from None


def _line(row: Row) -> str:
    return json.dumps(asdict(row), ensure_ascii=False)
