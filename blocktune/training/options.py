"""Groups of options of a run: which rows prompts have, what is learnt, how batches are made."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from blocktune.prompt import LayoutSpec
from blocktune.training.augment import Augmentation
from blocktune.training.distillation import Distillation
from blocktune.training.recompute import RecomputeSampler


@dataclass
class LayoutOptions:
    """How block examples become rows."""

    attention_execution: Literal["split", "flex", "dense"] = field(
        default="split", metadata={"help": "flex needs CUDA; dense makes an N x N mask"}
    )
    block_share: float = field(
        default=1.0, metadata={"help": "Share of examples in block layout, the rest full"}
    )
    both_modes: bool = field(
        default=False, metadata={"help": "Every example twice, in block layout and in full"}
    )
    num_links: int = field(default=0, metadata={"help": "Link tokens per chunk (KVLink)"})
    link_side: Literal["after", "before"] = field(
        default="after", metadata={"help": "Where a chunk's links stand"}
    )
    link_table: Literal["shared", "slot", "chunk"] = field(
        default="slot", metadata={"help": "One row for all links, one a slot, one a chunk and slot"}
    )
    max_chunks: int = field(
        default=0, metadata={"help": "Chunks that a link table by chunk has rows for"}
    )
    num_headers: int = field(
        default=0, metadata={"help": "Learned tokens that open a chunk (KV Packet, TurboRAG)"}
    )
    num_trailers: int = field(default=0, metadata={"help": "Learned tokens that close a chunk"})
    link_mode: Literal["table", "added_tokens"] = field(
        default="table", metadata={"help": "A table beside the vocabulary, or tokens in it"}
    )
    placement: Literal["sequential", "parallel", "composite"] = field(
        default="sequential", metadata={"help": "Positions of the chunks"}
    )
    shared_prefix: bool = field(
        default=False, metadata={"help": "Chunks are encoded after hidden copies of the prefix"}
    )

    @property
    def has_block(self) -> bool:
        """Whether any example is in block layout."""
        return self.both_modes or self.block_share > 0

    @property
    def layout(self) -> LayoutSpec:
        """How block examples are laid out; full ones have neither learned tokens nor ghosts."""
        return LayoutSpec(
            block=self.has_block,
            num_links=self.num_links,
            link_side=self.link_side,
            link_table=self.link_table,
            max_chunks=self.max_chunks,
            num_headers=self.num_headers,
            num_trailers=self.num_trailers,
            placement=self.placement,
            shared_prefix=self.shared_prefix,
        )


@dataclass
class ObjectiveOptions:
    """What the loss is."""

    distill_weight: float = field(
        default=0.0, metadata={"help": "Share of the divergence in the loss; the rest is CE"}
    )
    distill_teacher: str = field(
        default="self", metadata={"help": "'self' (the adapter off) or another model"}
    )
    distill_temperature: float = field(default=1.0, metadata={"help": "Of both distributions"})
    distill_top_k: int | None = field(
        default=None, metadata={"help": "Teacher tokens kept per row, the rest as one; default all"}
    )
    distill_states: Literal["none", "hidden", "kv"] = field(
        default="none", metadata={"help": "States of the question's rows that are matched too"}
    )
    distill_states_weight: float = field(
        default=1.0, metadata={"help": "Weight of the states' relative squared error"}
    )
    recompute: str = field(
        default="none",
        metadata={
            "help": "Selector whose tokens are fresh in training, e.g. 'deviation check_layer=2'"
        },
    )
    recompute_min: float = field(
        default=0.15, metadata={"help": "Smallest share of fresh tokens, drawn per prompt"}
    )
    recompute_max: float = field(default=0.15, metadata={"help": "Largest share"})

    @property
    def distillation(self) -> Distillation:
        """The divergence; off where its weight is 0."""
        return Distillation(
            weight=self.distill_weight,
            temperature=self.distill_temperature,
            top_k=self.distill_top_k,
            states=self.distill_states,
            states_weight=self.distill_states_weight,
        )

    @property
    def sampler(self) -> RecomputeSampler | None:
        """Which tokens get a fresh row, or None."""
        if self.recompute == "none":
            return None
        return RecomputeSampler.named(self.recompute, self.recompute_min, self.recompute_max)


@dataclass
class BatchOptions:
    """How examples become batches, and how layouts vary from epoch to epoch."""

    pack_length: int | None = field(
        default=None, metadata={"help": "Pack examples into rows of at most so many tokens"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest example in tokens; default: the model's context"}
    )
    long_examples: Literal["refuse", "drop"] = field(
        default="refuse", metadata={"help": "What to do with longer ones; never truncated"}
    )
    block_dropout: float = field(
        default=0.0, metadata={"help": "Chance that a chunk also sees the one before it"}
    )
    position_jitter: int = field(
        default=0, metadata={"help": "Largest random gap in positions before a chunk"}
    )

    @property
    def augmentation(self) -> Augmentation:
        """How layouts are varied."""
        return Augmentation(block_dropout=self.block_dropout, position_jitter=self.position_jitter)
