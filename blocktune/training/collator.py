"""Makes batches from the rows of a dataset. Their layout varies from epoch to epoch."""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info
from transformers import PreTrainedTokenizerBase

from blocktune.attention.interface import ATTACHED
from blocktune.data.example import RagExample
from blocktune.data.sources.records import LeftOut
from blocktune.layout import FOREVER, GLOBAL, NO_CHUNK, Kind, Layout
from blocktune.prompt import LayoutSpec, Pieces, Prompt, PromptFormat, lay_out, pack, stack
from blocktune.prompt.pieces import conversation_pieces, make_pieces
from blocktune.prompt.special_tokens import padding_id, require_embedded
from blocktune.registry import require_count, require_share
from blocktune.training.dataset import Sample, name_of, to_pieces, to_sample
from blocktune.training.order import draw_of
from blocktune.training.recompute import RecomputeSampler, with_fresh_rows


@dataclass(frozen=True)
class Augmentation:
    """Random changes to the layout of a block example."""

    block_dropout: float = 0.0  # probability that a chunk sees the previous one (arXiv:2605.15913)
    position_jitter: int = 0  # largest gap in positions before each chunk and the question

    def __post_init__(self):
        require_share("block_dropout", self.block_dropout)
        require_count("position_jitter", self.position_jitter)

    def vary(self, layout: Layout, draw: random.Random) -> Layout:
        """Joins chunks of one block example ``(1, S)`` at random, and shifts their positions."""
        if not self.block_dropout and not self.position_jitter:
            return layout
        groups, starts, gap = [], [], 0
        for index in range(int(layout.chunk.max()) + 1):
            joins = index > 0 and draw.random() < self.block_dropout
            groups.append(groups[-1] if joins else index)
            gap += draw.randint(0, self.position_jitter)
            starts.append(gap)
        end = gap + draw.randint(0, self.position_jitter)
        shifts = torch.tensor(starts)[layout.chunk.clamp(min=0)]
        shift = torch.where(layout.chunk == NO_CHUNK, end, shifts)
        shift = shift.masked_fill(layout.kind == Kind.PREFIX, 0)
        group = torch.tensor(groups)[layout.group.clamp(min=0)]
        group = torch.where(layout.group == GLOBAL, GLOBAL, group)
        return replace(layout, group=group, position=layout.position + shift)


FULL_ATTENTION = LayoutSpec(block=False)
MAX_CACHED = 20_000  # rows whose tokens are kept in memory; others are tokenised in every epoch
NO_SHARE = -1.0  # stands for the share of a prompt whose fresh rows are not chosen at a layer


@dataclass
class BlockDataCollator:
    """Lays out examples, packs those that share a row, and pads to the longest row of the batch.

    Works in any trainer that keeps the columns (``remove_unused_columns=False``) and whose model
    is attached (`blocktune.attach`). `BlockSFTTrainer` sets the fields that depend on the run.
    """

    tokenizer: PreTrainedTokenizerBase  # of the model
    layout: LayoutSpec = field(default_factory=LayoutSpec)  # how examples become rows
    format: PromptFormat = field(default_factory=PromptFormat)  # wording of the prompts
    link_base: int | None = None  # id of the first learned token; None without learned tokens
    max_length: int | None = None  # longest example in tokens; longer ones raise ValueError
    num_tokens: int | None = None  # rows of the model's embedding; None if unknown
    augmentation: Augmentation = field(default_factory=Augmentation)  # of block examples
    sampler: RecomputeSampler | None = None  # chooses fresh tokens of block examples, if any
    check_layer: int | None = None  # layer at which the sampler chooses; None: beforehand
    has_teacher: bool = False  # also lay out the teacher's prompts: full attention, no mode tags
    row_multiple: int = 1  # pad rows to a multiple of this: flex recompiles for each new length
    seed: int = 0  # of all random choices
    epoch: int = 0  # random choices depend on it; `BlockSFTTrainer` sets it
    _parts: dict[bytes, dict] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def row_growth(self) -> float:
        """Largest factor by which fresh rows lengthen a block example."""
        if self.sampler is None:
            return 1.0
        return 2.0 if self.check_layer is not None else 1.0 + self.sampler.high

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Makes a batch.

        Args:
            records: Rows that `to_sample` can read, or rows of a prepared dataset (`prepare`).

        Returns:
            ``input_ids``, ``labels`` and ``attention_mask`` (0 for padding) ``(B, S)``, and
            ``layout`` ``(B, S, fields)``. With a teacher the same as ``teacher_...``. With a
            sampler that chooses at a layer also ``shares`` ``(B, prompts)`` float64: the share of
            tokens of each packed prompt that stays fresh above that layer, or `NO_SHARE`.

        Raises ValueError if a row cannot be read, or is longer than ``max_length``.
        """
        if not ATTACHED and get_worker_info() is None:
            _warn_unattached()
        rows = [[self._lay_out(part) for part in self._parts_of(record)] for record in records]
        batch = self._tensors([prompt for prompt, _, _ in row] for row in rows)
        batch["attention_mask"] = (batch["layout"][..., 0] != Kind.PAD).long()
        if self.has_teacher:
            teacher = self._tensors([teacher for _, teacher, _ in row] for row in rows)
            batch |= {f"teacher_{name}": value for name, value in teacher.items()}
        if self.check_layer is not None:
            shares = [torch.tensor([s for _, _, s in row], dtype=torch.float64) for row in rows]
            batch["shares"] = pad_sequence(shares, batch_first=True, padding_value=NO_SHARE)
        return batch

    def _parts_of(self, record: Mapping[str, Any]) -> Sequence[Mapping[str, Any]]:
        """The token pieces of a row: from a prepared dataset, from memory, or tokenised now."""
        if isinstance(record, RagExample):
            record = record.to_json()
        if "parts" in record:
            return record["parts"]
        if not record:
            raise ValueError(
                "the trainer removed all columns; set remove_unused_columns: false, and "
                "dataset_kwargs: {skip_prepare_dataset: true}"
            )
        text = json.dumps(record, sort_keys=True, default=repr)
        key = hashlib.blake2b(text.encode(), digest_size=16).digest()
        if (part := self._parts.get(key)) is None:
            part = self._part_of(record, int.from_bytes(key[:4]))
            if len(self._parts) < MAX_CACHED:
                self._parts[key] = part
        return [part]

    def _part_of(self, record: Mapping[str, Any], index: int) -> dict[str, Any]:
        try:
            sample = to_sample(record, self.tokenizer, self.format)
        except LeftOut as reason:
            raise ValueError(f"a row cannot be learned ({reason}); give it 'documents'") from None
        name = f"a row ('{sample.example.question:.40}')"
        part = self._read(index, sample._replace(block=self.layout.block), name)
        if self.max_length is not None and part["length"] > self.max_length:
            raise ValueError(f"{name} has {part['length']} tokens, max_length is {self.max_length}")
        return part

    @property
    def reader(self) -> Callable[[int, Sample], dict[str, Any]]:
        """Tokenises a sample, given its index, into its part of a dataset row."""
        return self._read

    def _read(self, index: int, sample: Sample, name: str | None = None) -> dict[str, Any]:
        block, spec, fmt = sample.block, self.layout, sample.wording or self.format
        try:
            pieces = self._pieces(sample, fmt)
            plain = self._pieces(sample, fmt.untagged).prefix if self.has_teacher else ()
            if self.num_tokens is not None:
                require_embedded(self.tokenizer, self.num_tokens, *pieces.all)
            if block:
                spec.link_rows(len(pieces.chunks) - 1)  # raises if the last chunk has none
        except ValueError as error:
            raise ValueError(f"{name or name_of(index, sample)}: {error}") from None
        added = spec.num_links + spec.num_headers + spec.num_trailers if block else 0
        turns = [{"query": _ids(query), "answer": _ids(reply)} for query, reply in pieces.followups]
        return {
            "prefix": _ids(pieces.prefix),
            "chunks": [_ids(chunk) for chunk in pieces.chunks],
            "query": _ids(pieces.query),
            "answer": _ids(pieces.answer),
            "followups": turns,
            "teacher_prefix": _ids(plain),
            "block": block,
            "index": index,
            "length": pieces.num_tokens + added * len(pieces.chunks),
        }

    def _pieces(self, sample: Sample, fmt: PromptFormat) -> Pieces:
        own, block = sample.example, sample.block
        if sample.turns and not block and own.conversation:
            return conversation_pieces(self.tokenizer, fmt, own.conversation, own.target)
        fields = own.chunks, own.question, own.target, block, own.followups
        return make_pieces(self.tokenizer, fmt, *fields)

    def _lay_out(self, part: Mapping[str, Any]) -> tuple[Prompt, Prompt | None, float]:
        """The rows of one example, those for its teacher, and its share of fresh tokens."""
        pieces, teacher = to_pieces(part), None
        if self.has_teacher:
            plain = pieces._replace(prefix=tuple(part["teacher_prefix"]))
            teacher = lay_out(plain, FULL_ATTENTION)
        if not part["block"]:
            return lay_out(pieces, FULL_ATTENTION), teacher, NO_SHARE
        draw = draw_of(self.seed, self.epoch, part["index"], part["block"])
        prompt = lay_out(pieces, self.layout, self.link_base)
        prompt = Prompt(prompt.input_ids, self.augmentation.vary(prompt.layout, draw))
        if self.sampler is None:
            return prompt, teacher, NO_SHARE
        share = draw.uniform(self.sampler.low, self.sampler.high)
        chosen = self.sampler.selector(share, draw).start(prompt.layout)
        until = FOREVER if self.check_layer is None else self.check_layer
        return with_fresh_rows(prompt, chosen, until), teacher, share

    def _tensors(self, rows: Sequence[list[Prompt]]) -> dict[str, Tensor]:
        joined = [row[0] if len(row) == 1 else pack(row) for row in rows]
        pad_id = padding_id(self.tokenizer, self.num_tokens or len(self.tokenizer))
        batch = stack(joined, pad_id, multiple=self.row_multiple)
        layout = batch.layout.pack()
        return {"input_ids": batch.input_ids, "labels": batch.labels, "layout": layout}


def _ids(ids: Sequence[int]) -> np.ndarray:
    """An array of 4 bytes per token; Python ints take ten times as much."""
    return np.array(ids, dtype=np.int32)


@functools.cache
def _warn_unattached() -> None:
    logging.getLogger(__name__).warning(
        "no model of this process is attached, so it ignores layouts; call blocktune.attach(model)"
    )
