"""What a training run can be told; every field is a YAML key and a command line option."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from trl import SFTConfig

from blocktune.prompt import LayoutSpec, PromptFormat

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
    "load_best_model_at_end": False,
    "average_tokens_across_devices": True,
}


@dataclass
class DataArgs:
    """Where examples come from and how they are worded."""

    train_data: str = field(
        default="", metadata={"help": "Source of examples, see `load_examples`: file, hf:, worlds:"}
    )
    train_limit: int | None = field(
        default=None, metadata={"help": "Use the first examples only, at most this many"}
    )
    eval_data: str | None = field(
        default=None, metadata={"help": "Source of examples for the evaluation loss"}
    )
    eval_limit: int | None = field(
        default=None, metadata={"help": "Evaluate on the first examples only"}
    )
    instruction: str = field(
        default=PromptFormat.instruction, metadata={"help": "Opens the user turn"}
    )
    system: str | None = field(default=None, metadata={"help": "Text of the system turn"})
    titled: str = field(
        default=PromptFormat.titled, metadata={"help": "A chunk with {title} and {text}"}
    )
    untitled: str = field(
        default=PromptFormat.untitled, metadata={"help": "A chunk without a title: {text}"}
    )
    question_format: str = field(
        default=PromptFormat.question, metadata={"help": "What follows the chunks: {question}"}
    )

    def __post_init__(self):
        if not self.train_data:
            raise ValueError("train_data is missing; name a source, e.g. 'worlds:train?seed=1'")
        _ = self.format  # checks the wording before anything is loaded

    @property
    def format(self) -> PromptFormat:
        """The wording of every prompt."""
        return PromptFormat(
            self.instruction, self.system, self.titled, self.untitled, self.question_format
        )


@dataclass
class BlockSFTConfig(SFTConfig):
    """TRL's `SFTConfig` with the layout, the links and the execution of attention.

    Raises:
        ValueError: If a value is not accepted, or an option of TRL is set that would change
            prompts or the loss in a way the layout knows nothing of.
    """

    attention_execution: Literal["split", "flex", "dense"] = field(
        default="split", metadata={"help": "flex needs CUDA; dense makes an N x N mask"}
    )
    block_share: float = field(
        default=1.0, metadata={"help": "Share of examples in block layout, the rest full"}
    )
    num_links: int = field(default=0, metadata={"help": "Link tokens per chunk (KVLink)"})
    link_side: Literal["after", "before"] = field(
        default="after", metadata={"help": "Where a chunk's links stand"}
    )
    link_mode: Literal["table", "added_tokens"] = field(
        default="table", metadata={"help": "A table beside the vocabulary, or tokens in it"}
    )
    placement: Literal["sequential", "parallel", "composite"] = field(
        default="sequential", metadata={"help": "Positions of the chunks"}
    )
    shared_prefix: bool = field(
        default=False, metadata={"help": "Chunks are encoded after hidden copies of the prefix"}
    )
    freeze_base: bool = field(
        default=False, metadata={"help": "Train the link table alone (without use_peft)"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Longest example in tokens; default: the model's context"}
    )
    long_examples: Literal["refuse", "drop"] = field(
        default="refuse", metadata={"help": "What to do with longer ones; never truncated"}
    )
    dry_run: bool = field(default=False, metadata={"help": "Stop after printing the plan"})

    def __post_init__(self):
        if self.bf16 is None:  # TRL would choose bfloat16 on CPUs too
            self.bf16 = not self.fp16 and torch.cuda.is_available()
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__post_init__()
        for name, wanted in _MUST_BE.items():
            if getattr(self, name) != wanted:
                raise ValueError(
                    f"block training needs {name}: {wanted}, got {getattr(self, name)!r}; it would "
                    "change prompts or loss without the layout; leave it out"
                )
        if self.router_aux_loss_coef:
            raise ValueError("router_aux_loss_coef is not supported; leave it out or set it to 0")
        self.router_aux_loss_coef = 0.0
        self._check_own()

    @property
    def layout(self) -> LayoutSpec:
        """How block examples are laid out; full ones have neither links nor ghosts."""
        return LayoutSpec(
            num_links=self.num_links,
            link_side=self.link_side,
            placement=self.placement,
            shared_prefix=self.shared_prefix,
        )

    def _check_own(self) -> None:
        _one_of("attention_execution", self.attention_execution, ("split", "flex", "dense"))
        _one_of("link_mode", self.link_mode, ("table", "added_tokens"))
        _one_of("long_examples", self.long_examples, ("refuse", "drop"))
        if not 0.0 <= self.block_share <= 1.0:
            raise ValueError(f"block_share must be in [0, 1], got {self.block_share}")
        if self.attention_execution == "flex" and self.use_cpu:
            raise ValueError(
                "attention_execution 'flex' has no backward on a CPU; use 'split', or a GPU"
            )
        if self.freeze_base and (not self.num_links or self.link_mode != "table"):
            raise ValueError(
                "freeze_base trains the link table alone: it needs num_links of at least 1 and "
                "link_mode 'table'"
            )
        _ = self.layout  # checks its own fields


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
