"""TRL's SFTTrainer over layouts: own collator, own loss, adapters that carry their layout."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from blocktune.attention import attach
from blocktune.layout import Layout
from blocktune.training.checkpoint import AdapterFiles, StagedSaving
from blocktune.training.collator import Augmentation, BlockCollator
from blocktune.training.config import BlockSFTConfig
from blocktune.training.cost import matmul_rate, row_flops, size_of
from blocktune.training.dataset import COLUMNS
from blocktune.training.distillation import evaluating
from blocktune.training.launch_checks import launch_name, refuse_lost_launch, refuse_parallelism
from blocktune.training.lora import precision_kept
from blocktune.training.loss import Objective, StepLoss
from blocktune.training.recompute import narrowed, states_at
from blocktune.training.reductions import Sums
from blocktune.training.sampler import EpochOrder
from blocktune.training.throughput import Speedometer


class BlockSFTTrainer(StagedSaving, SFTTrainer):
    """Trains a model on layouts.

    The loss is the sum over answer tokens divided by their number in the whole step, so it is
    the same for any split of a global batch over accumulation steps and processes.

    Args:
        model: PEFT-wrapped or bare, links installed; blocktune's attention is attached here.
        args: The run's configuration.
        files: Writes and restores adapters.
        collator: Lays the dataset's pieces out.
        objective: The loss of a batch.
        train_dataset: See `blocktune.training.dataset.prepare`.
        tokenizer: Saved beside the adapter.
        eval_dataset: For the evaluation loss, or None.
        callbacks: Of transformers' Trainer.

    Raises:
        ValueError: Under context or sequence parallelism, which would drop the layout.
    """

    _tag_names = ["blocktune", "trl", "sft"]  # noqa: RUF012 (TRL's own shape)
    _name = "Block SFT"
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: PreTrainedModel,
        args: BlockSFTConfig,
        files: AdapterFiles,
        collator: BlockCollator,
        objective: Objective,
        train_dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        attach(model)
        self.files, self.objective, self.collator = files, objective, collator
        self.order: EpochOrder | None = None
        self._sums = {"train": Sums(), "eval": Sums()}
        with precision_kept(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=collator,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                callbacks=callbacks,
            )
        # The Trainer then counts the answer tokens of all accumulation steps and ranks.
        self.model_accepts_loss_kwargs = True
        refuse_parallelism(self.accelerator)
        refuse_lost_launch(self.accelerator, args.n_gpu, self.is_deepspeed_enabled)
        state_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
        self.size = size_of(self.model, state_dtype.itemsize)
        self.speed = Speedometer(
            row_flops(self.size, objective.teacher is not None),
            matmul_rate(args.device, state_dtype) * self.accelerator.num_processes,
        )
        self.add_callback(_Rhythm(self))
        self.files = self.files.launched(
            self.accelerator.num_processes, launch_name(self.accelerator)
        )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Cross-entropy of the answers under each prompt's layout."""
        if return_outputs:
            raise ValueError("block training evaluates the loss only; leave compute_metrics out")
        bare = self.accelerator.unwrap_model(model)
        inputs = self._narrowed(bare, inputs)
        result = self.objective(model, inputs, bare)
        self._count(result, Layout.unpack(inputs["layout"]))
        if num_items_in_batch is None:
            return result.total / result.answers.num_tokens
        # Both DDP and DeepSpeed average gradients over ranks; the token count is over all ranks.
        return result.total * self.accelerator.num_processes / num_items_in_batch

    def _narrowed(self, model: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Asks the selector of fresh rows, where it chooses by what the model makes of them."""
        layout, layer = Layout.unpack(inputs["layout"]), self.collator.check_layer
        if layer is None:
            return inputs
        with evaluating(model):
            states = states_at(
                model,
                inputs["input_ids"],
                layout,
                layer,
                self.args.attention_execution,
                stop=not (self.is_fsdp_enabled or is_deepspeed_zero3_enabled()),
            )
        layout = narrowed(
            layout, states, layer, self.size.layers, self.collator.sampler, inputs["shares"]
        )
        return {**inputs, "layout": layout.pack()}

    def _count(self, result: StepLoss, layout: Layout) -> None:
        """Adds up over ranks; means of micro-batches would weigh their tokens unequally."""
        mode = "train" if self.model.training else "eval"
        answers = result.answers
        counts = [answers.num_tokens, answers.num_correct, (~layout.is_pad).sum()]
        nats = [result.total.detach(), answers.total.detach(), result.divergence, result.states]
        both = torch.stack([value.double() for value in (*counts, *nats)])
        sums = Sums(*self.accelerator.gather(both).view(-1, len(both)).sum(0).tolist())
        self._sums[mode] = self._sums[mode].plus(sums)
        if mode == "train":
            self._total_train_tokens += int(sums.rows)
            self.state.num_input_tokens_seen = self._total_train_tokens  # a checkpoint keeps it
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means per answer token, speed in real tokens, utilisation and the time left."""
        mode = "train" if self.model.training else "eval"
        means = self._sums[mode].means(taught=self.objective.teacher is not None)
        self._sums[mode] = Sums()
        logs |= {f"eval_{name}" if mode == "eval" else name: mean for name, mean in means.items()}
        if "loss" in logs:
            step, last = self.state.global_step, self.state.max_steps
            logs |= self.speed.read(self._total_train_tokens, step, last)
        super().log(logs, start_time)

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """As the Trainer's; the loss is per answer token, whatever the batches were."""
        self._sums["eval"] = Sums()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self._sums["eval"]
        output.metrics[f"{metric_key_prefix}_loss"] = sums.total / max(sums.tokens, 1)
        return output

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        """The order of the run's epochs; `_Rhythm` tells it which one begins."""
        args = self.args
        if args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.order = EpochOrder(
            rows["length"],
            rows["answer_length"].count(0),
            step if args.train_sampling_strategy == "group_by_length" else None,
            args.seed if args.data_seed is None else args.data_seed,
        )
        return self.order

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Evaluation without augmentation, the same in every epoch."""
        varied = self.data_collator
        self.data_collator = replace(self.collator, augmentation=Augmentation(), epoch=0)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = varied

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = COLUMNS

    def _send_telemetry(self) -> None:
        """None is sent."""


class _Rhythm(TrainerCallback):
    """Starts the clock, and tells collator and order their epoch before its first batch."""

    def __init__(self, trainer: BlockSFTTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._total_train_tokens = state.num_input_tokens_seen
        self.trainer.speed.start(self.trainer._total_train_tokens, state.global_step)

    def on_epoch_begin(self, args, state, control, **kwargs):
        # A resumed run counts epochs in fractions; rounding must not fall into the one before.
        epoch = int((state.epoch or 0) + 1e-6)
        self.trainer.collator.epoch = epoch
        if self.trainer.order is not None:
            self.trainer.order.epoch = epoch
