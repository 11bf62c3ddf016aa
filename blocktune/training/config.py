"""What a training run can be told; every field is a YAML key and a command line option."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from trl import SFTConfig

from blocktune.training.data_args import DataArgs
from blocktune.training.options import BatchOptions, LayoutOptions, ObjectiveOptions

__all__ = ["BlockSFTConfig", "DataArgs"]

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
    "dataloader_persistent_workers": False,
    "model_init_kwargs": None,
}
ORDERS = ("random", "group_by_length", "sequential")
_HINTS = {"packing": "pack_length packs by layout", "padding_free": "pack_length packs by layout"}


@dataclass
class BlockSFTConfig(LayoutOptions, ObjectiveOptions, BatchOptions, SFTConfig):
    """TRL's `SFTConfig` with the layout, the objective and the execution of attention.

    Raises:
        ValueError: If a value is not accepted, or an option of TRL is set that would change
            prompts or the loss in a way the layout knows nothing of.
    """

    freeze_base: bool = field(
        default=False, metadata={"help": "Train the learned tokens alone (without use_peft)"}
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
                    f"change prompts or loss without the layout; {_HINTS.get(name, 'leave it out')}"
                )
        if self.router_aux_loss_coef:
            raise ValueError("router_aux_loss_coef is not supported; leave it out or set it to 0")
        self.router_aux_loss_coef = 0.0
        self._check_own()

    def _check_own(self) -> None:
        _one_of("attention_execution", self.attention_execution, ("split", "flex", "dense"))
        _one_of("link_mode", self.link_mode, ("table", "added_tokens"))
        _one_of("long_examples", self.long_examples, ("refuse", "drop"))
        _one_of("train_sampling_strategy", self.train_sampling_strategy, ORDERS)
        _at_least_1("per_device_train_batch_size", self.per_device_train_batch_size)
        _at_least_1("per_device_eval_batch_size", self.per_device_eval_batch_size)
        _at_least_1("gradient_accumulation_steps", self.gradient_accumulation_steps)
        _at_least_1("max_length", self.max_length)
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
                "links, headers and trailers stand in block examples, and there are none; raise "
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
        self._check_together()

    def _check_together(self) -> None:
        sampler, varies = self.sampler, self.augmentation
        if sampler is not None and not self.has_block:
            raise ValueError("recompute freshens tokens of block examples; raise block_share")
        if varies.block_dropout and self.shared_prefix:
            raise ValueError(
                "block_dropout joins chunks that each carry a copy of the prefix; drop it or "
                "shared_prefix"
            )
        if varies.position_jitter and self.placement != "sequential":
            raise ValueError(
                f"position_jitter moves chunks apart, placement '{self.placement}' puts them in "
                "one place; drop one"
            )


def _at_least_1(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
