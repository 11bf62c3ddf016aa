"""From examples to a dataset of token pieces; rows are laid out batch by batch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset, Features, Value
from datasets import Sequence as ListOf
from transformers import PreTrainedTokenizerBase

from blocktune.data.example import RagExample
from blocktune.prompt import LayoutSpec, Pieces, PromptFormat, make_pieces

FEATURES = Features(
    {
        "prefix": ListOf(Value("int32")),
        "chunks": ListOf(ListOf(Value("int32"))),
        "query": ListOf(Value("int32")),
        "answer": ListOf(Value("int32")),
        "block": Value("bool"),
        "length": Value("int32"),
    }
)
COLUMNS = list(FEATURES)


@dataclass(frozen=True)
class Prepared:
    """A dataset of pieces and what was left out of it.

    Attributes:
        dataset: Columns `COLUMNS`; ``length`` counts rows that are no ghosts.
        num_dropped: Examples longer than the limit.
    """

    dataset: Dataset
    num_dropped: int


def prepare(
    examples: Sequence[RagExample],
    tokenizer: PreTrainedTokenizerBase,
    fmt: PromptFormat,
    spec: LayoutSpec,
    *,
    limit: int,
    drop_long: bool = False,
    block_share: float = 1.0,
    seed: int = 0,
) -> Prepared:
    """Tokenises examples and decides which are trained in block layout.

    Args:
        examples: With an answer each.
        tokenizer: The base's.
        fmt: The wording.
        spec: The block layout, for the count of links.
        limit: Longest example, in rows that are no ghosts.
        drop_long: Leave longer examples out instead of refusing them.
        block_share: Exactly this share, rounded, is in block layout.
        seed: Chooses which.

    Raises:
        ValueError: If an example is too long, has no answer, or none is left.
    """
    is_block = _choose_block(len(examples), block_share, seed)
    records, num_dropped = [], 0
    for index, example in enumerate(examples):
        record = _record(example, tokenizer, fmt, spec, is_block[index])
        if record["length"] <= limit:
            records.append(record)
        elif drop_long:
            num_dropped += 1
        else:
            raise ValueError(
                f"example {index} ('{example.id or example.question:.40}') has {record['length']} "
                f"tokens, the limit is {limit} (max_length, or the model's context); shorten it "
                "or set long_examples: drop"
            )
    if not records:
        raise ValueError(
            f"no example to train on: {len(examples)} came, {num_dropped} had more than {limit} "
            "tokens; check the source and max_length"
        )
    return Prepared(Dataset.from_list(records, features=FEATURES), num_dropped)


def to_pieces(record: dict[str, Any]) -> Pieces:
    """The pieces of one row of the dataset."""
    chunks = tuple(tuple(chunk) for chunk in record["chunks"])
    return Pieces(tuple(record["prefix"]), chunks, tuple(record["query"]), tuple(record["answer"]))


def _choose_block(count: int, share: float, seed: int) -> list[bool]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    chosen = set(order[: round(share * count)])
    return [index in chosen for index in range(count)]


def _record(example, tokenizer, fmt, spec: LayoutSpec, block: bool) -> dict[str, Any]:
    pieces = make_pieces(tokenizer, fmt, example.chunks, example.question, example.target)
    tokens = sum(map(len, (pieces.prefix, *pieces.chunks, pieces.query, pieces.answer)))
    links = spec.num_links * len(pieces.chunks) if block else 0
    return {**pieces._asdict(), "block": block, "length": tokens + links}
