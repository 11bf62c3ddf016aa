"""How a trainer saves: a folder appears whole under its name, or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer import TRAINING_ARGS_NAME, rotate_checkpoints

from blocktune.adapter import INFO_FILE
from blocktune.training.checkpoint import (
    STAGING,
    AdapterFiles,
    is_links_only,
    move_files,
    move_into_place,
)


class StagedSaving(Trainer):
    """Saves adapters and checkpoints through a staging folder.

    A checkpoint is renamed when every rank has written its part, so that a kill leaves the older
    checkpoints and no half of a new one.

    Attributes:
        files: Writes and restores adapters.
    """

    files: AdapterFiles
    _staging: bool = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's, without what a killed run was about to save."""
        if self.args.should_save:
            shutil.rmtree(Path(self.args.output_dir) / STAGING, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        return super().train(*args, **kwargs)

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
        self.files.write_info(model, folder, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        model = self.model if model is None else model
        if not is_links_only(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.files.has_links:
            self.files.restore_links(self.accelerator.unwrap_model(model), resume_from_checkpoint)
