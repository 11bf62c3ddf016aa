"""What a run leaves on disk: a folder appears whole, under its name, or not at all."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import AutoTokenizer, Trainer
from transformers.trainer import TRAINING_ARGS_NAME, rotate_checkpoints

from blocktune.adapter import INFO_FILE, OWN_WEIGHTS, AdapterInfo
from blocktune.links import (
    LINKS_FILE,
    LINKS_MODULE,
    LinkTable,
    installed_links,
    load_links,
    save_links,
)
from blocktune.models.identity import base_fingerprint, tokenizer_hash
from blocktune.models.sharded import fill

STAGING = ".saving"
CONFIG_FILE = "resolved_config.yaml"


@dataclass(frozen=True)
class AdapterFiles:
    """Writes and restores what is blocktune's own in an adapter's folder.

    Attributes:
        info: Becomes ``blocktune.json``.
        config: Every setting of the run; becomes ``resolved_config.yaml``.
        links_only: The base is frozen and has no PEFT adapter, so it is not written.
    """

    info: AdapterInfo
    config: dict[str, Any]
    links_only: bool = False

    def launched(self, world_size: int, launch: str) -> AdapterFiles:
        """With the processes of the run in the provenance, as they are, not as they were asked."""
        training = {**self.info.training, "world_size": world_size, "launch": launch}
        return replace(self, info=replace(self.info, training=training))

    def write_weights(self, model: nn.Module, folder: Path, state: dict[str, Tensor] | None):
        """Writes the trained weights: the PEFT adapter or the full model, and the links.

        Args:
            model: Unwrapped.
            folder: Where to.
            state: Weights by name, where a launch has split those in ``model`` over processes.
        """
        table = installed_links(model)
        if hasattr(model, "peft_config"):
            # Left to itself PEFT writes whole embeddings after a resize, not the trained rows.
            model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        elif not self.links_only:
            state = model.state_dict() if state is None else state
            kept = {name: w for name, w in state.items() if not name.startswith(LINKS_MODULE)}
            model.save_pretrained(folder, state_dict=kept)
        if table is not None:
            save_links(table if state is None else _whole_table(state), folder)

    def write_info(
        self, model: nn.Module, folder: Path, state: dict[str, Tensor] | None = None
    ) -> None:
        """Writes configuration and info, which makes the folder an adapter.

        A fully trained model is its own base: its folder serves as model and as adapter.
        """
        (folder / CONFIG_FILE).write_text(yaml.safe_dump(self.config, sort_keys=False))
        info = self.info
        if not self.links_only and not hasattr(model, "peft_config"):
            origin = {**info.training, "started_from": info.base_model}
            info = replace(
                info,
                base_model=OWN_WEIGHTS,
                base_fingerprint=base_fingerprint(model, state),
                # With the tokens that were added: the folder's tokenizer is the base's from now on.
                tokenizer_hash=tokenizer_hash(AutoTokenizer.from_pretrained(folder)),
                training=origin,
            )
        info.save(folder)

    @torch.no_grad()
    def restore_links(self, model: nn.Module, folder: str | Path) -> None:
        """Reads the link table of a checkpoint into the installed one."""
        table = installed_links(model)
        if table is not None:
            saved = load_links(folder).to(table.weight.device, table.weight.dtype)
            fill(table.weight, saved.weight)

    @property
    def has_links(self) -> bool:
        """Whether there is a table."""
        return self.info.has_table


def _whole_table(state: dict[str, Tensor]) -> LinkTable:
    [weight] = [w for name, w in state.items() if name.endswith(f"{LINKS_MODULE}.weight")]
    table = LinkTable(*weight.shape, dtype=weight.dtype)
    table.weight.data.copy_(weight)
    return table


def move_into_place(source: Path, target: Path) -> None:
    """Renames a whole folder to its final name, replacing one of that name."""
    if target.exists():
        shutil.rmtree(target)
    os.replace(source, target)


def move_files(source: Path, target: Path, last: str) -> None:
    """Moves a folder's entries one by one, the file ``last`` at the end."""
    target.mkdir(parents=True, exist_ok=True)
    for path in sorted(source.iterdir(), key=lambda path: path.name == last):
        if path.is_dir():
            move_into_place(path, target / path.name)
        else:
            os.replace(path, target / path.name)
    source.rmdir()


def is_links_only(folder: str | Path) -> bool:
    """Whether a checkpoint holds links and no other weights."""
    names = {path.name for path in Path(folder).glob("*.safetensors")}
    return names == {LINKS_FILE}


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
