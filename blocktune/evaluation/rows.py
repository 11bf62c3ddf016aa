"""One row per question and method, written to disk at once, so that an interrupted run resumes."""

from __future__ import annotations

import ast
import glob
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import blocktune
from blocktune.data import RagExample
from blocktune.evaluation.metrics import METRICS, extract_answer
from blocktune.evaluation.suite import MethodSpec, TaskSpec
from blocktune.files import append_lines, replace_text, truncate_lines, whole_lines
from blocktune.methods import Method
from blocktune.models.identity import digest_of
from blocktune.parsing import check_types
from blocktune.registry import require_share

ROWS = "rows"
COMMON = ("em", "f1", "substring_em")  # metrics of the extracted answer that every row has


@dataclass(frozen=True)
class Row:
    """One method's answer to one question, with its scores."""

    key: str  # digest of everything that the answer depends on; see `row_key`
    task: str  # name of the task
    id: str  # the question's identifier in its source, or its number
    kind: str  # kind of question, e.g. ``2-hop``
    prediction: str  # the model's output
    answer: str  # the part of the output that is scored
    em: float  # exact match, 0 or 1
    f1: float  # word F1
    substring_em: float  # substring match, 0 or 1
    recompute_ratio: float  # share of context tokens recomputed, over all layers
    usage: Mapping[str, Any]  # counters of `Usage`, without times
    score: float  # the task's headline metric
    scores: Mapping[str, float] = field(default_factory=dict)  # the task's further metrics, by name
    prompt_hash: str = ""  # digest of the prompt's token ids: prefix, chunks, question
    place: float | None = None  # mean position of the evidence, 0 (first chunk) to 1 (last)


PARTS = (
    *("layout.py", "links.py", "registry.py", "models", "positions", "attention", "prompt"),
    *("adapter", "cache", "methods", "extras", "engine"),
    *(f"evaluation/{n}.py" for n in ("metrics", "rows", "suite", "prepare", "ttft", "fidelity")),
)
"""Code that outputs, scores and times depend on; commands, training and reports do not matter."""
LIBRARIES = {"site-packages", "dist-packages"}  # folders of installed libraries


def code_digest(method: Method | None = None, metrics: Iterable[str] = ()) -> str:
    """Version and digest of the code in `PARTS`, such as ``0.1.0-3f2a91c05d7e``.

    For a ``method`` or ``metrics`` that plug-ins define, in whole or in part, their digest follows.
    """
    made = *_classes_of(method), *(METRICS[name].score for name in metrics)
    plugins = sorted({path for one in made for path in _sources_of(one)})
    digest = f"{blocktune.__version__}-{_package_digest()}"
    own = hashlib.sha256(b"\0".join(path.read_bytes() for path in plugins)).hexdigest()
    return f"{digest}-{own[:12]}" if plugins else digest


@cache
def _package_digest() -> str:
    root, digest = Path(blocktune.__file__).parent, hashlib.sha256()
    for part in PARTS:
        own = [root / part] if part.endswith(".py") else (root / part).rglob("*.py")
        for path in sorted(own):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _classes_of(value: Any) -> Iterator[type]:
    """The classes that define a method: its own, and those of its selector and other parts."""
    parts = list(value) if isinstance(value, tuple) else []
    if isinstance(value, Method):
        parts = [value.select(), value.repair(), value.reshape(), value.history]
    if is_dataclass(value) and not isinstance(value, type):
        yield from type(value).__mro__
        parts += [getattr(value, own.name) for own in fields(value)]
    yield from chain.from_iterable(map(_classes_of, parts))


def _sources_of(made: type | Callable) -> set[Path]:
    """Files of a plug-in's class or function and of what it imports, but ours and libraries."""
    first = made.__module__.partition(".")[0]
    left, files, seen = [first], set(), {blocktune.__name__, *sys.stdlib_module_names}
    while left:
        name = left.pop().partition(".")[0]
        module = sys.modules.get(name)
        file = Path(getattr(module, "__file__", None) or "")  # a notebook has none
        if name in seen or (name != first and LIBRARIES.intersection(file.parts)):
            continue
        seen.add(name)
        folders = getattr(module, "__path__", ())
        own = [path for folder in folders for path in Path(folder).rglob("*.py")]
        own = own if folders or not file.name else [file]
        files.update(own)
        left += chain.from_iterable(map(_imports, own))
    return files


def _imports(path: Path) -> Iterator[str]:
    with suppress(SyntaxError, ValueError):  # compiled, or a template
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Import):
                yield from (alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module


def row_key(
    method: MethodSpec, task: TaskSpec, example: RagExample, weights: str, code: str, codec: str
) -> str:
    """Digest of weights, method, code, wording, decoding and question: equal keys, equal rows.

    ``weights`` is the engine's fingerprint, ``codec`` its store's, ``code`` a `code_digest`.
    """
    entry = method.entry()
    if "preset" in entry:  # then the name is only a label
        del entry["name"]
    parts = {"method": entry, "task": task.decides(), "example": example.to_json()}
    parts |= {} if codec == "as-is" else {"codec": codec}
    return digest_of(parts | {"weights": weights, "code": code})


def question_id(task: TaskSpec, example: RagExample) -> str:
    """The question's own id, or else one of its text: files may be cut or reordered."""
    return example.id or f"{task.name}/{digest_of([example.question, example.answers])}"


def make_row(
    key: str, task: TaskSpec, example: RagExample, answer: Any, engine: Any, method: Any
) -> Row:
    """Scores an `Answer` of the engine."""
    extracted = extract_answer(task.cut(answer.text))
    scores = scores_of(task, answer.text, example, engine.tokenizer)
    return Row(
        key=key,
        task=task.name,
        id=question_id(task, example),
        kind=example.kind,
        prediction=answer.text,
        answer=extracted,
        **{metric: METRICS[metric].score(extracted, example.answers, None) for metric in COMMON},
        recompute_ratio=answer.usage.recompute_ratio,
        usage={k: v for k, v in vars(answer.usage).items() if not k.startswith("ttft")},
        score=scores[task.metric],
        scores={metric: scores[metric] for metric in task.metrics},
        prompt_hash=digest_of(engine.prompts.pieces(example, method)[:3]),
        place=place_of(example),
    )


def scores_of(task: TaskSpec, text: str, example: RagExample, tokenizer: Any) -> dict[str, float]:
    """Scores one output by the task's headline metric and its further metrics."""
    scored, scores = task.cut(text), {}
    for name in {task.metric, *task.metrics}:
        try:
            scores[name] = float(METRICS[name].score(scored, example.answers, tokenizer))
        except (AttributeError, TypeError) as error:  # of a plug-in
            how = "a `Metric`, whose score(output, answers, tokenizer) returns a number"
            raise ValueError(f"metric '{name}' must be {how}: {error}") from error
        require_share(f"a score of metric '{name}'", scores[name])
    return scores


def place_of(example: RagExample) -> float | None:
    """Mean position of the supporting chunks, 0 (first chunk) to 1 (last), or None if unknown."""
    last = len(example.chunks) - 1
    return fmean(example.supporting) / last if example.supporting and last else None


class RowFile:
    """The rows of one method in ``LABEL.jsonl``; during a run, one part file per process.

    Opening only reads; all processes must do so before one appends. ``keys`` has the `row_key` of
    every row, in order; other rows are ignored.
    """

    def __init__(self, folder: Path, label: str, keys: Iterable[str], rank: int = 0):
        self.path, self.keys = folder / f"{label}.jsonl", list(keys)
        self._part = folder / f"{label}.part{rank}.jsonl"
        self._rows, self._opened = self._wanted_rows(), False

    def refuse_loss(self, questions: Iterable[tuple[TaskSpec, RagExample]]) -> None:
        """Raises ValueError if `merge` would delete answers to other questions."""
        asked = ((task.name, question_id(task, example)) for task, example in questions)
        whole, *parts = ([(row.task, row.id) for row in read_rows(p)] for p in self._paths())
        # A part may have several rows of one question, from runs of different code.
        if lost := (Counter(whole) | Counter(set(chain(*parts)))) - Counter(asked):
            raise ValueError(
                f"'{self.path}' has answers to {lost.total()} questions that this run does not "
                f"ask, such as {min(lost)[1]!r}, and would lose them; give another output folder, "
                "or move this one away"
            )

    def lacks(self, indices: Iterable[int]) -> bool:
        """Whether a row of these questions is missing."""
        return any(self.keys[index] not in self._rows for index in indices)

    def append(self, rows: Iterable[Row]) -> None:
        """Adds rows to this process's part file; they are on disk when it returns."""
        if not self._opened:  # cuts an incomplete last line of an earlier run
            truncate_lines(self._part, len(whole_lines(self._part)))
            self._opened = True
        new = {row.key: row for row in rows if row.key not in self._rows}
        append_lines(self._part, map(_line, new.values()))
        self._rows |= new

    def merge(self) -> list[Row]:
        """Joins all parts into one file in the order of the questions, and returns its rows.

        Only one process may call it, after all have finished. KeyError: a row is missing.
        """
        by_key = self._wanted_rows()
        rows = [by_key[key] for key in self.keys]
        replace_text(self.path, "".join(_line(row) + "\n" for row in rows))
        for part in self._paths()[1:]:
            part.unlink()
        return rows

    def _wanted_rows(self) -> dict[str, Row]:
        rows, wanted = chain(*map(read_rows, self._paths())), set(self.keys)
        return {row.key: row for row in rows if row.key in wanted}

    def _paths(self) -> list[Path]:
        parts = self.path.parent.glob(f"{glob.escape(self.path.stem)}.part*.jsonl")
        return [self.path, *sorted(parts)]


def read_all(folder: Path, labels: Sequence[str]) -> dict[str, list[Row]]:
    """The rows of a finished run by label; raises ValueError if a label has no rows."""
    rows = {label: list(read_rows(folder / ROWS / f"{label}.jsonl")) for label in labels}
    if missing := [label for label, own in rows.items() if not own]:
        raise ValueError(f"no rows of '{missing[0]}' in '{folder / ROWS}'; finish the run first")
    return rows


def read_rows(path: Path) -> Iterator[Row]:
    """Complete lines of a file as rows; raises ValueError if a line is not a row."""
    for number, line in enumerate(whole_lines(path), start=1):
        try:
            check_types(row := Row(**json.loads(line)), "a value")
            if not all(0 <= value <= 1 for value in (row.score, row.em, row.f1)):
                raise ValueError("its score, em and f1 must be from 0 to 1")
            yield row
        except (ValueError, TypeError) as error:
            reason = f"not a row of this version ({error}); move it away"
            raise ValueError(f"{path}, line {number}: {reason}") from None


def _line(row: Row) -> str:
    return json.dumps(asdict(row), ensure_ascii=False)
