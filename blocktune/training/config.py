"""What a training run can be told; every field is a YAML key and a command line option."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar

import torch
from trl import SFTConfig

from blocktune.adapter.scope import SCOPES
from blocktune.parsing import mapping, parse_yaml
from blocktune.prompt import LayoutSpec, PromptFormat
from blocktune.training.collator import Augmentation
from blocktune.training.distillation import Distillation
from blocktune.training.recompute import RecomputeSampler

Spec = TypeVar("Spec")


def option(default: Any, meaning: str) -> Any:
    """A field with its default and its text in ``--help-all``."""
    return field(default=default, metadata={"help": meaning})


def _built(spec: type[Spec], options: Any, prefix: str = "", **given: Any) -> Spec:
    """A ``spec`` from the options that are called like its fields after ``prefix``."""
    names = [f.name for f in fields(spec) if f.name not in given]
    own = {
        name: getattr(options, prefix + name) for name in names if hasattr(options, prefix + name)
    }
    return spec(**own, **given)


@dataclass
class LayoutOptions:
    """How block examples become rows."""

    attention_execution: Literal["split", "flex", "dense"] = option(
        "split", "flex needs CUDA; dense makes an N x N mask"
    )
    block_share: float = option(1.0, "Share of examples in block layout, the rest full")
    both_modes: bool = option(False, "Every example twice, in block layout and in full")
    num_links: int = option(0, "Link tokens per chunk (KVLink)")
    link_side: Literal["after", "before"] = option("after", "Where a chunk's links are placed")
    link_table: Literal["shared", "slot", "chunk"] = option(
        "slot", "One row for all links, one a slot, one a chunk and slot"
    )
    max_chunks: int = option(0, "Chunks that a link table by chunk has rows for")
    num_headers: int = option(0, "Learned tokens that open a chunk (KV Packet, TurboRAG)")
    num_trailers: int = option(0, "Learned tokens that close a chunk")
    link_mode: Literal["table", "added_tokens"] = option(
        "table", "A table beside the vocabulary, or tokens in it"
    )
    placement: Literal["sequential", "parallel", "composite"] = option(
        "sequential", "Positions of the chunks"
    )
    shared_prefix: bool = option(False, "Chunks are encoded after hidden copies of the prefix")

    @property
    def has_block(self) -> bool:
        """Whether any example is in block layout."""
        return self.both_modes or self.block_share > 0

    @property
    def layout(self) -> LayoutSpec:
        """How block examples are laid out; full ones have neither learned tokens nor blanks."""
        return _built(LayoutSpec, self, block=self.has_block)


@dataclass
class ObjectiveOptions:
    """What the loss is."""

    distill_weight: float = option(0.0, "Share of the divergence in the loss; the rest is CE")
    distill_teacher: str = option("self", "'self' (the adapter off) or another model")
    distill_temperature: float = option(1.0, "Of both distributions")
    distill_top_k: int | None = option(
        None, "Teacher tokens kept per row, the rest as one; default all"
    )
    distill_states: Literal["none", "hidden", "kv"] = option(
        "none", "States of the question's rows that are matched too"
    )
    distill_states_weight: float = option(1.0, "Weight of the states' relative squared error")
    recompute: str = option(
        "none", "Selector whose tokens are fresh in training, e.g. 'deviation check_layer=2'"
    )
    recompute_min: float = option(0.15, "Smallest share of fresh tokens, drawn per prompt")
    recompute_max: float = option(0.15, "Largest share")

    @property
    def distillation(self) -> Distillation:
        """The divergence; off where its weight is 0."""
        return _built(Distillation, self, "distill_")

    @property
    def sampler(self) -> RecomputeSampler | None:
        """Which tokens get a fresh row, or None."""
        if self.recompute == "none":
            return None
        return RecomputeSampler.named(self.recompute, self.recompute_min, self.recompute_max)


@dataclass
class BatchOptions:
    """How examples become batches, and how layouts vary from epoch to epoch."""

    pack_length: int | None = option(None, "Pack examples into rows of at most this many tokens")
    max_length: int | None = option(None, "Longest example in tokens; default: the model's context")
    long_examples: Literal["refuse", "drop"] = option(
        "refuse", "What to do with longer ones; never truncated"
    )
    block_dropout: float = option(0.0, "Chance that a chunk also sees the one before it")
    position_jitter: int = option(0, "Largest random gap in positions before a chunk")

    @property
    def augmentation(self) -> Augmentation:
        """How layouts are varied."""
        return _built(Augmentation, self)


# Options of SFTConfig that would cut, repack or rewrite prompts behind the layout's back.
_MUST_BE = {
    "packing": False,
    "padding_free": False,
    "eval_packing": None,
    "assistant_only_loss": False,
    "completion_only_loss": None,
    "loss_type": "nll",
    "use_liger_kernel": False,
    "label_smoothing_factor": 0.0,
    "chat_template_path": None,
    "eos_token": None,
    "pad_to_multiple_of": None,
    "average_tokens_across_devices": True,
    "dataloader_persistent_workers": False,
    "model_init_kwargs": None,
}
_CHOICES = {
    "attention_execution": ("split", "flex", "dense"),
    "link_mode": ("table", "added_tokens"),
    "scope": SCOPES,
    "long_examples": ("refuse", "drop"),
    "train_sampling_strategy": ("random", "group_by_length", "sequential"),
}
_AT_LEAST_1 = (
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "max_length"),
)
_HINTS = {"packing": "pack_length packs by layout", "padding_free": "pack_length packs by layout"}


@dataclass
class BlockSFTConfig(LayoutOptions, ObjectiveOptions, BatchOptions, SFTConfig):
    """TRL's `SFTConfig` with the layout, the objective and the execution of attention.

    ValueError for a value that is not accepted, or an option of TRL that would change prompts
    or the loss in a way the layout knows nothing of.
    """

    scope: Literal["both", "encode", "read"] = option(
        "both", "Rows that LoRA acts on: encode, those of chunks; read, all others; both"
    )
    freeze_base: bool = option(False, "Train the learned tokens alone (without use_peft)")
    dry_run: bool = option(False, "Stop after printing the plan")
    overwrite: bool = option(False, "Start again, where output_dir holds an earlier run")

    def __post_init__(self):
        self._check_types()
        if self.bf16 is None:  # TRL would choose bfloat16 on CPUs too
            self.bf16 = not self.fp16 and torch.cuda.is_available()
        # Else the Trainer refuses bf16, and several processes train alone.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__post_init__()
        for name, wanted in _MUST_BE.items():
            if getattr(self, name) != wanted:
                raise ValueError(
                    f"block training needs {name}: {wanted}, got {getattr(self, name)!r}; it would "
                    f"change prompts or loss without the layout; {_HINTS.get(name, 'leave it out')}"
                )
        if self.router_aux_loss_coef:
            raise ValueError("router_aux_loss_coef is not supported; leave it out or set it to 0")
        self.router_aux_loss_coef = 0.0
        self._check_own()

    def _check_types(self) -> None:
        """What the libraries below would fail on: numbers that are none, text for a mapping."""
        for one in fields(self):
            value = getattr(self, one.name)
            if isinstance(value, float) and not 0 <= value < math.inf:
                raise ValueError(f"{one.name} must be a number of at least 0, got {value}")
            if isinstance(value, str) and one.name.endswith("_kwargs"):
                setattr(self, one.name, mapping(parse_yaml(value, one.name), one.name))

    def _check_own(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir is empty; name a folder for the adapter")
        for name, known in _CHOICES.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        for name in _AT_LEAST_1:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(
                f"num_train_epochs must be above 0, got {self.num_train_epochs}; or set max_steps"
            )
        if not 0.0 <= self.block_share <= 1.0:
            raise ValueError(f"block_share must be in [0, 1], got {self.block_share}")
        if self.both_modes and self.block_share != 1.0:
            raise ValueError("both_modes trains every example in both; leave block_share out")
        if self.attention_execution == "flex" and self.use_cpu:
            raise ValueError(
                "attention_execution 'flex' has no backward on a CPU; use 'split', or a GPU"
            )
        # Each of these checks its own fields.
        spec, _, _ = self.layout, self.augmentation, self.distillation
        if not spec.block and spec.num_learned:
            raise ValueError(
                "links, headers and trailers need block examples, and there are none; raise "
                "block_share or leave them out"
            )
        if spec.num_links and (spec.num_headers or spec.num_trailers):
            raise ValueError(
                "no method serves an adapter with link tokens and learned tokens around chunks at "
                "once; drop num_links, or num_headers and num_trailers"
            )
        if self.freeze_base and (not spec.num_learned or self.link_mode != "table"):
            raise ValueError(
                "freeze_base trains the learned tokens alone: it needs num_links, num_headers or "
                "num_trailers of at least 1, and link_mode 'table'"
            )
        if self.sampler is not None and not spec.block:
            raise ValueError("recompute adds rows to block examples; raise block_share")
        if self.block_dropout and self.shared_prefix:
            raise ValueError(
                "block_dropout joins chunks that each carry a copy of the prefix; drop it or "
                "shared_prefix"
            )
        if self.position_jitter and self.placement != "sequential":
            raise ValueError(
                f"position_jitter moves chunks apart, placement '{self.placement}' puts them in "
                "one place; drop one"
            )


@dataclass
class DataArgs:
    """Where examples come from and how they are worded."""

    train_data: str = option("", "Source of examples, see `load_examples`: file, hf:, worlds:")
    train_limit: int | None = option(None, "Use the first examples only, at most this many")
    mixture: str | None = option(None, "YAML of a mixture of sources and modes, for train_data")
    eval_data: str | None = option(None, "Source of examples for the evaluation loss")
    eval_limit: int | None = option(None, "Evaluate on the first examples only")
    instruction: str = option(PromptFormat.instruction, "Opens the user turn")
    system: str | None = option(None, "Text of the system turn")
    titled: str = option(PromptFormat.titled, "A chunk with {title} and {text}")
    untitled: str = option(PromptFormat.untitled, "A chunk without a title: {text}")
    question_format: str = option(PromptFormat.question, "What follows the chunks: {question}")
    block_tag: str = option("", "Tells the model of block examples, also when served")
    full_tag: str = option("", "The same in full attention")
    tag_place: str = option("turn", "Where tags stand: before the instruction (turn) or the prompt")
    strip: bool = option(False, "Strip passages, and questions at their end")

    def __post_init__(self):
        if not self.train_data and not self.mixture:
            raise ValueError("train_data is missing; name a source, e.g. 'worlds:train?seed=1'")
        if self.mixture and (self.train_data or self.train_limit is not None):
            raise ValueError(
                "a mixture names its own sources and limits; leave train_data and train_limit out"
            )
        _ = self.format  # checks the wording before anything is loaded

    @property
    def format(self) -> PromptFormat:
        """The wording of every prompt."""
        return _built(PromptFormat, self, question=self.question_format)
