"""The settings of a training run. Every field is a YAML key and a command-line option."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import torch
from trl import SFTConfig

from blocktune.parsing import mapping, parse_yaml
from blocktune.prompt import LayoutSpec, PromptFormat
from blocktune.registry import require_one_of, require_share
from blocktune.training.collator import Augmentation
from blocktune.training.recompute import RecomputeSampler

Spec = TypeVar("Spec")


def option(default: Any, meaning: str) -> Any:
    """A dataclass field with a default and a description for ``--help-all``."""
    return field(default=default, metadata={"help": meaning})


def choices(options: type) -> dict[str, tuple[str, ...]]:
    """The values that each field with a fixed set of them may have."""
    kinds = get_type_hints(options) | {"train_sampling_strategy": _STRATEGIES}
    return {name: get_args(kind) for name, kind in kinds.items() if get_origin(kind) is Literal}


def _built(spec: type[Spec], options: Any, **given: Any) -> Spec:
    names = [f.name for f in fields(spec) if hasattr(options, f.name)]
    return spec(**{name: getattr(options, name) for name in names} | given)


@dataclass
class LayoutOptions:
    """How block examples become rows."""

    attention_execution: Literal["split", "flex", "dense"] = option(
        "split", "How block attention is computed: flex needs CUDA; dense builds an N x N mask"
    )
    block_share: float = option(1.0, "Share of examples in block layout; others: full attention")
    both_modes: bool = option(False, "Train every example in block and in full attention")
    num_links: int = option(0, "Link tokens per chunk (KVLink)")
    link_side: Literal["after", "before"] = option("after", "Links before or after their chunk")
    link_table: Literal["shared", "slot", "chunk"] = option(
        "slot", "Embeddings of links: one shared by all, one per slot, or per chunk and slot"
    )
    max_chunks: int = option(0, "Number of chunks that link_table 'chunk' has rows for")
    num_headers: int = option(0, "Learned tokens before each chunk (KV Packet, TurboRAG)")
    num_trailers: int = option(0, "Learned tokens after each chunk")
    link_mode: Literal["table", "added_tokens"] = option(
        "table", "Learned tokens in a table beside the vocabulary, or added to it"
    )
    placement: Literal["sequential", "parallel", "composite"] = option(
        "sequential", "Positions of chunks: sequential, parallel or composite"
    )
    shared_prefix: bool = option(False, "Encode every chunk after a hidden copy of the prefix")

    @property
    def has_block(self) -> bool:
        """Whether any example is in block layout."""
        return self.both_modes or self.block_share > 0

    @property
    def layout(self) -> LayoutSpec:
        """The layout of block examples. Full ones have no learned tokens and no blanks."""
        return _built(LayoutSpec, self, block=self.has_block)


@dataclass
class ObjectiveOptions:
    """The loss: cross-entropy, distillation and recomputed tokens."""

    distill_weight: float = option(0.0, "Share of the KL divergence; the rest is cross-entropy")
    distill_teacher: str = option("self", "'self' (the model without its adapter) or another model")
    distill_temperature: float = option(1.0, "Temperature of teacher and student")
    distill_top_k: int | None = option(None, "Teacher tokens kept per row; others count as one")
    distill_states: Literal["none", "hidden", "kv"] = option(
        "none", "States of the question's rows to match with the teacher's as well"
    )
    distill_states_weight: float = option(1.0, "Weight of the states' relative squared error")
    recompute: str = option("none", "Selector of recomputed tokens: first-k, random, deviation")
    recompute_min: float = option(0.15, "Smallest share of recomputed tokens, drawn per prompt")
    recompute_max: float = option(0.15, "Largest share of recomputed tokens")

    @property
    def matches_states(self) -> bool:
        """Whether states are matched."""
        return self.distill_states != "none" and self.distill_states_weight > 0

    @property
    def has_teacher(self) -> bool:
        """Whether the loss needs a teacher."""
        return self.distill_weight > 0 or self.matches_states

    @property
    def sampler(self) -> RecomputeSampler | None:
        """Chooses the tokens that get a fresh row; None without ``recompute``."""
        if self.recompute == "none":
            return None
        return RecomputeSampler.named(self.recompute, self.recompute_min, self.recompute_max)


@dataclass
class BatchOptions:
    """How examples become batches, and how layouts vary from epoch to epoch."""

    pack_length: int | None = option(None, "Pack examples into rows of at most this many tokens")
    max_length: int | None = option(None, "Longest example in tokens; default: the model's context")
    long_examples: Literal["refuse", "drop"] = option("refuse", "What to do with longer examples")
    block_dropout: float = option(0.0, "Probability that a chunk also sees the previous one")
    position_jitter: int = option(0, "Largest random gap in positions before a chunk")

    @property
    def augmentation(self) -> Augmentation:
        """The random changes to layouts."""
        return _built(Augmentation, self)


# Options of SFTConfig that would truncate, repack or rewrite prompts without their layout.
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
    # Of transformers' own push; `blocktune train` pushes once, after the run.
    "hub_strategy": "every_save",
    "hub_always_push": False,
    "hub_revision": None,
}
_STRATEGIES = Literal["random", "group_by_length", "sequential"]  # of ``train_sampling_strategy``
_AT_LEAST_1 = (
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
    *("gradient_accumulation_steps", "max_length", "pack_length", "distill_top_k"),
)


@dataclass
class BlockSFTConfig(LayoutOptions, ObjectiveOptions, BatchOptions, SFTConfig):
    """TRL's `SFTConfig` with options for the layout, the objective and batches.

    Raises ValueError for a value that is not accepted, or an option that ignores the layout.
    """

    scope: Literal["both", "encode", "read"] = option(
        "both", "Rows that LoRA acts on: those of chunks (encode), all others (read), or both"
    )
    freeze_base: bool = option(False, "Train only the learned tokens (without use_peft)")
    dry_run: bool = option(False, "Stop after printing the plan")
    overwrite: bool = option(False, "Replace an earlier run in output_dir")

    def __post_init__(self):
        self._check_types()
        if self.bf16 is None:  # TRL would choose bfloat16 on CPUs too
            self.bf16 = not self.fp16 and torch.cuda.is_available()
        # Without it the Trainer refuses bf16 on CPUs, and each of several processes trains alone.
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__post_init__()
        for name, required in _MUST_BE.items():
            value = getattr(self, name)
            if value != required and (name, value) != ("hub_strategy", "end"):
                hint = " (pack_length packs by layout)" if "pack" in name else ""
                got = f"{value!r}; leave it out{hint}"
                raise ValueError(f"block training needs {name}: {required}, got {got}")
        if self.router_aux_loss_coef:
            raise ValueError("router_aux_loss_coef is not supported; leave it out or set it to 0")
        self.router_aux_loss_coef = 0.0
        self._check_own()

    def _check_types(self) -> None:
        """Checks values that TRL would fail on: floats that are not numbers, text for a mapping."""
        for name, value in list(vars(self).items()):
            if isinstance(value, float) and not 0 <= value < math.inf:
                raise ValueError(f"{name} must be a number of at least 0, got {value}")
            if isinstance(value, str) and name.endswith("_kwargs"):
                setattr(self, name, mapping(parse_yaml(value, name), name))

    def _check_own(self) -> None:
        if not self.output_dir:
            raise ValueError("output_dir is empty; name a folder for the adapter")
        for name, values in choices(type(self)).items():
            require_one_of(name, getattr(self, name), values)
        for name in _AT_LEAST_1:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in ("fp16", "activation_offloading"):
            if getattr(self, name) and self.use_cpu:
                raise ValueError(f"{name} is for GPUs; leave it out on a CPU")
        if self.trust_remote_code:
            raise ValueError("trust_remote_code: code of repositories is never run; leave it out")
        if self.max_steps <= 0 and self.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs must be above 0, got {self.num_train_epochs}")
        for name in ("block_share", "distill_weight"):
            require_share(name, getattr(self, name))
        if self.distill_temperature <= 0:
            raise ValueError(f"distill_temperature must be above 0, got {self.distill_temperature}")
        if self.both_modes and self.block_share != 1.0:
            raise ValueError("both_modes trains every example in both; leave block_share out")
        if self.attention_execution == "flex" and self.use_cpu:
            raise ValueError("attention_execution 'flex' has no backward on a CPU; use 'split'")
        # creating these objects checks their fields
        spec, sampler, _ = self.layout, self.sampler, self.augmentation
        if (spec.num_learned or sampler is not None) and not spec.block:
            raise ValueError("learned tokens and recompute need block examples; raise block_share")
        if spec.num_links and (spec.num_headers or spec.num_trailers):
            raise ValueError("no method serves an adapter with link tokens and headers or trailers")
        if self.freeze_base and (not spec.num_learned or self.link_mode != "table"):
            raise ValueError(
                "freeze_base trains only the learned tokens of a table; set num_links, num_headers "
                "or num_trailers, and link_mode: table"
            )
        if self.block_dropout and self.shared_prefix:
            raise ValueError("block_dropout does not fit shared_prefix; drop it or shared_prefix")
        if self.position_jitter and self.placement != "sequential":
            raise ValueError(f"position_jitter does not fit placement '{self.placement}'; drop one")


@dataclass
class DataArgs:
    """The data of a run and the wording of its prompts."""

    train_data: str = option("", "Source of examples (see `blocktune data list`)")
    train_limit: int | None = option(None, "Use at most this many of the first examples")
    mixture: str | None = option(None, "YAML file of a mixture of sources, in place of train_data")
    eval_data: str | None = option(None, "Source of examples for the evaluation loss")
    eval_limit: int | None = option(None, "Evaluate on at most this many of the first examples")
    instruction: str = option(PromptFormat.instruction, "Text at the start of the user turn")
    system: str | None = option(None, "Text of the system turn")
    titled: str = option(PromptFormat.titled, "Format of a chunk with {title} and {text}")
    untitled: str = option(PromptFormat.untitled, "Format of a chunk without a title: {text}")
    question_format: str = option(PromptFormat.question, "Format of the {question} after chunks")
    block_tag: str = option("", "Text that marks prompts in block layout, also when served")
    full_tag: str = option("", "Text that marks prompts in full attention")
    tag_place: str = option("turn", "Place of tags: before the instruction (turn) or the prompt")
    strip: bool = option(False, "Strip white space around passages and after questions")

    def __post_init__(self):
        if not self.train_data and not self.mixture:
            raise ValueError("train_data is missing; name a source, e.g. 'worlds:train?seed=1'")
        if self.mixture and (self.train_data or self.train_limit is not None):
            raise ValueError("a mixture has its own sources; leave out train_data and train_limit")
        if self.eval_limit is not None and not self.eval_data:
            raise ValueError("eval_limit has no effect without eval_data; leave it out")
        _ = self.format  # checks the wording before anything is loaded

    @property
    def format(self) -> PromptFormat:
        """The format of prompts."""
        return _built(PromptFormat, self, question=self.question_format)
