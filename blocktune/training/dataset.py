"""Converts a user's rows to examples, and examples to a dataset of token pieces."""

from __future__ import annotations

import bisect
import hashlib
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from datasets import Dataset, Features, Value, concatenate_datasets
from datasets import Sequence as ListOf
from transformers import PreTrainedTokenizerBase

from blocktune.data.example import FIELDS, RagExample, own_wording, plain
from blocktune.data.sources.catalog import data_sets_of
from blocktune.data.sources.shapes import SHAPES
from blocktune.prompt import Pieces, PromptFormat

IDS = ListOf(Value("int32"))
PART = {
    "prefix": IDS,
    "chunks": ListOf(IDS),
    "query": IDS,
    "answer": IDS,
    "followups": ListOf({"query": IDS, "answer": IDS}),
    "teacher_prefix": IDS,
    "block": Value("bool"),
    "index": Value("int32"),
    "length": Value("int32"),
}
FEATURES = Features({"parts": [PART], "length": Value("int32"), "answer_length": Value("int32")})
COLUMNS = list(FEATURES)
ROWS_AT_A_TIME = 100  # rows converted to columns at once; as Python lists they take much memory


class Sample(NamedTuple):
    """An example in one mode, block layout or full attention."""

    example: RagExample  # a conversation or a question over chunks
    block: bool  # in block layout; else in full attention
    wording: PromptFormat | None = None  # its own prompt format; None: the run's
    turns: bool = False  # in full attention, write a conversation as turns of the chat template


def to_sample(row: Any, tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat) -> Sample:
    """Converts a row of a Hugging Face `Dataset`, or a dict, to a sample in block layout.

    Args:
        row: A `Sample` or `RagExample`; or columns ``question``, ``chunks`` and ``answers``; or
            ``messages`` (or ``prompt`` and ``completion``) with ``documents``; or any other record
            that `load_examples` reads. Other columns are ignored.
        tokenizer: The model's; used for records that are cut into chunks.
        fmt: The run's prompt format, used for a row whose messages have a system turn.

    Raises ValueError if the row is none of these; names the column.
    """
    if isinstance(row, Sample):
        return row
    if not isinstance(row, RagExample):
        if not isinstance(row, Mapping):
            raise ValueError(f"a row must be a dict of columns, got {type(row).__name__}")
        row = plain(row)
        if (shape := next((shape for shape in SHAPES if shape.fits(row)), None)) is None:
            raise ValueError(
                f"no known shape; the columns are {', '.join(map(str, row))}, wanted are question, "
                "chunks and answers, or messages with documents"
            )
        if shape.key == "blocktune":
            row = {key: value for key, value in row.items() if key in {*FIELDS, "answer"}}
        row = shape.parser(None, tokenizer)(row)
    return Sample(row, True, own_wording(row, fmt))


@dataclass(frozen=True)
class Prepared:
    """A dataset of token pieces, with counts of its examples."""

    # columns `COLUMNS`. A row holds the examples packed into it, or one without packing. ``length``
    # counts its rows in the model without blanks and fresh ones. Rows with an ``answer_length`` of
    # 0 have no labels and come last, see ``multiple_of`` of `prepare`
    dataset: Dataset
    num_examples: int  # in the dataset; an example in both modes counts twice
    num_block: int  # number of those in block layout
    num_dropped: int  # number of examples longer than the limit
    data_sets: Mapping[str, str] = field(default_factory=dict)  # names on the Hub to licences
    digest: str = ""  # of all tokens in order: 16 hex digits


def in_modes(
    examples: Iterable[Sample | RagExample],
    block_share: float = 1.0,
    both: bool = False,
    seed: int = 0,
) -> list[Sample]:
    """Decides which examples are trained in block layout, and keeps their order.

    A share of ``block_share``, rounded and chosen by ``seed``, is in block layout, the rest in full
    attention (KVLink: 0.4). With ``both``, every example is in both modes (Block-Attention).
    """
    samples = [e if isinstance(e, Sample) else Sample(e, True) for e in examples]
    if both:
        return [sample._replace(block=block) for sample in samples for block in (True, False)]
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    chosen = set(order[: round(block_share * len(samples))])
    return [sample._replace(block=index in chosen) for index, sample in enumerate(samples)]


def prepare(
    samples: Sequence[Sample],
    read: Callable[[int, Sample], dict[str, Any]],
    *,
    limit: int,
    drop_long: bool = False,
    pack_length: int | None = None,
    position_gap: int = 0,
    multiple_of: int = 1,
) -> Prepared:
    """Tokenises examples that have answers, and packs them if ``pack_length`` is set.

    Args:
        samples: Examples and their modes.
        read: Tokenises an example, given its index: `BlockDataCollator.reader`.
        limit: Most tokens of an example, learned ones included, and most positions.
        drop_long: Drop longer examples instead of raising an error.
        pack_length: Most tokens of a packed row; None does not pack.
        position_gap: Largest gap in positions before each chunk of a block example.
        multiple_of: Number of rows that all ranks take at a time. Rows without labels fill up the
            last round; otherwise accelerate would repeat the first rows, which then count twice.

    Raises ValueError if an example is too long or has no answer, or if no example is left.
    """
    parts, num_dropped, longest = [], 0, limit
    for index, sample in enumerate(samples):
        part = read(index, sample)
        gaps = position_gap * (len(part["chunks"]) + 1) if sample.block else 0
        longest = min(limit - gaps, pack_length or limit)
        if part["length"] <= longest:
            parts.append(part)
        elif drop_long:
            num_dropped += 1
        else:
            gap_note = f" less {gaps} for position_jitter" if gaps else ""
            raise ValueError(
                f"{name_of(index, sample)} has {part['length']} tokens, the limit is {longest} "
                f"(of pack_length, max_length and the model{gap_note}); shorten it or set "
                "long_examples: drop"
            )
    if not parts:
        raise ValueError(
            f"no example to train on: of {len(samples)} rows, {num_dropped} have more than "
            f"{longest} tokens; raise max_length or pack_length"
        )
    rows = [[part] for part in parts] if pack_length is None else best_fit(parts, pack_length)
    blank = _unanswered(min(parts, key=lambda part: part["length"]))
    rows += [[blank]] * (-len(rows) % multiple_of)
    num_block, data_sets = sum(p["block"] for p in parts), data_sets_of(s.example for s in samples)
    return Prepared(_columns(rows), len(parts), num_block, num_dropped, data_sets, _digest(parts))


def _columns(rows: list[list[dict[str, Any]]]) -> Dataset:
    tables = []
    for start in range(0, len(rows), ROWS_AT_A_TIME):
        records = []
        for row in rows[start : start + ROWS_AT_A_TIME]:
            answers = sum(len(turn["answer"]) for p in row for turn in (p, *p["followups"]))
            length = sum(part["length"] for part in row)
            records.append({"parts": row, "length": length, "answer_length": answers})
        tables.append(Dataset.from_list(records, features=FEATURES))
    return concatenate_datasets(tables)


def best_fit(parts: Sequence[dict[str, Any]], room: int) -> list[list[dict[str, Any]]]:
    """Packs parts into rows of ``room`` tokens: longest first, into the fullest row with space.

    The parts of a row keep their order. The result is deterministic.
    """
    order = sorted(range(len(parts)), key=lambda index: (-parts[index]["length"], index))
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for index in order:
        length = parts[index]["length"]
        place = bisect.bisect_left(free, (length, -1))
        left, row = free.pop(place) if place < len(free) else (room, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(index)
        bisect.insort(free, (left - length, row))
    return [[parts[index] for index in sorted(row)] for row in rows]


def to_pieces(part: dict[str, Any]) -> Pieces:
    """The token pieces of one example of a row."""
    chunks = tuple(tuple(chunk) for chunk in part["chunks"])
    turns = tuple((tuple(t["query"]), tuple(t["answer"])) for t in part["followups"])
    return Pieces(tuple(part["prefix"]), chunks, tuple(part["query"]), tuple(part["answer"]), turns)


def _digest(parts: Sequence[dict[str, Any]]) -> str:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        turns = [ids for turn in part["followups"] for ids in turn.values()]
        for ids in (part["prefix"], *part["chunks"], part["query"], part["answer"], *turns):
            digest.update(len(ids).to_bytes(4) + ids.tobytes())
        digest.update(b"" if part["block"] else b"full")
    return digest.hexdigest()


def name_of(index: int, sample: Sample) -> str:
    """What errors call an example."""
    return f"example {index} ('{sample.example.id or sample.example.question:.40}')"


def _unanswered(part: dict[str, Any]) -> dict[str, Any]:
    removed = [part["answer"], *(ids for turn in part["followups"] for ids in turn.values())]
    length = part["length"] - sum(map(len, removed))
    return part | {"answer": [], "followups": [], "length": length}
