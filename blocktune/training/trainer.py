"""TRL's SFTTrainer over layouts: own collator, own loss, adapters that carry their layout."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer import TRAINING_ARGS_NAME, rotate_checkpoints
from trl import SFTTrainer

from blocktune.adapter import INFO_FILE
from blocktune.attention import attach
from blocktune.layout import Layout
from blocktune.training.checkpoint import (
    STAGING,
    AdapterFiles,
    is_links_only,
    move_files,
    move_into_place,
)
from blocktune.training.collator import BlockCollator
from blocktune.training.config import BlockSFTConfig
from blocktune.training.dataset import COLUMNS
from blocktune.training.loss import answer_loss


class BlockSFTTrainer(SFTTrainer):
    """Trains a model on layouts.

    The loss is the sum over answer tokens divided by their number in the whole step, so it is
    the same for any split of a global batch over accumulation steps and processes.

    Args:
        model: PEFT-wrapped or bare, links installed; blocktune's attention is attached here.
        args: The run's configuration.
        files: Writes and restores adapters.
        collator: Lays the dataset's pieces out.
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
        train_dataset: Dataset,
        tokenizer: PreTrainedTokenizerBase,
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ):
        attach(model)
        self.files = files
        self._staging = False
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
        self._refuse_parallelism()
        self._refuse_lost_launch()
        self.files = self.files.launched(
            self.accelerator.num_processes, self.accelerator.distributed_type.value
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
        layout = Layout.unpack(inputs["layout"])
        result = answer_loss(
            model, inputs["input_ids"], layout, inputs["labels"], self.args.attention_execution
        )
        self._count(result, (~layout.is_pad).sum())
        if num_items_in_batch is None:
            return result.total / result.num_tokens
        # Both DDP and DeepSpeed average gradients over ranks; the token count is over all ranks.
        return result.total * self.accelerator.num_processes / num_items_in_batch

    def _count(self, result, num_rows: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        counts = torch.stack([result.num_tokens, result.num_correct, num_rows])
        tokens, correct, rows = self.accelerator.gather(counts).view(-1, 3).sum(0).tolist()
        if mode == "train":
            self._total_train_tokens += rows
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]
        self._metrics[mode]["mean_token_accuracy"].append(correct / max(tokens, 1))

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = COLUMNS

    def _send_telemetry(self) -> None:
        """None is sent."""

    def _refuse_parallelism(self) -> None:
        parallel = self.accelerator.parallelism_config
        for kind in ("cp", "sp"):
            if parallel is not None and getattr(parallel, f"{kind}_enabled", False):
                raise ValueError(
                    f"{kind}_size > 1 splits prompts over devices and drops the layout's mask; "
                    f"set {kind}_size to 1"
                )

    def _refuse_lost_launch(self) -> None:
        """A launch that quietly runs alone trains, saves over its twins and looks well."""
        started = int(os.environ.get("WORLD_SIZE", "1"))
        if started != self.accelerator.num_processes:
            raise ValueError(
                f"the launcher started {started} processes and each of them trains alone; "
                "on CPUs set use_cpu: true (or --use_cpu true)"
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process sees {self.args.n_gpu} GPUs and would cut prompts from their layouts "
                f"between them; start one per GPU (blocktune train --processes {self.args.n_gpu}) "
                "or show it one (CUDA_VISIBLE_DEVICES=0)"
            )
        asked = os.environ.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true"
        if asked and not self.is_deepspeed_enabled:
            raise ValueError(
                "the launcher asked for DeepSpeed and the Trainer runs without it; launch with "
                "recipes/accelerate/zero2.yaml and pass no deepspeed option to the recipe"
            )

    # Saving. A checkpoint is written in a staging folder and renamed when every rank has written
    # its part, so that a kill leaves the older checkpoints and no half of a new one.

    def _get_output_dir(self, trial: Any) -> str:
        run_dir = super()._get_output_dir(trial)
        return str(Path(run_dir) / STAGING) if self._staging else run_dir

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._staging = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._staging = False
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            run_dir = Path(self._get_output_dir(trial))
            name = f"checkpoint-{self.state.global_step}"
            move_into_place(run_dir / STAGING / name, run_dir / name)
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapter into ``output_dir``, its ``blocktune.json`` last."""
        target = Path(output_dir or self.args.output_dir)
        if _internal_call:
            super().save_model(str(target), _internal_call=True)
            return
        super().save_model(str(target / STAGING / "adapter"), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            move_files(target / STAGING / "adapter", target, last=INFO_FILE)
            (target / STAGING).rmdir()

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        self.files.write_weights(model, folder, state_dict)
        self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)
        self.files.write_info(model, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        model = self.model if model is None else model
        if not is_links_only(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.files.has_links:
            self.files.restore_links(self.accelerator.unwrap_model(model), resume_from_checkpoint)
