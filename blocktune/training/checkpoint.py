"""Saving and restoring of adapters and checkpoints. A folder appears complete or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME, TRAINING_ARGS_NAME, rotate_checkpoints
from transformers.trainer_utils import SaveStrategy

from blocktune import links
from blocktune.adapter import INFO_FILE, OWN_WEIGHTS, PEFT_FILE, AdapterInfo, scope_of
from blocktune.attention.interface import decoder_of, is_attached
from blocktune.files import alone_in, move_entries, move_folder
from blocktune.models.identity import base_fingerprint, tokenizer_hash
from blocktune.models.load import read_tokenizer
from blocktune.models.quantize import quantization_of
from blocktune.models.sharded import fill
from blocktune.provenance import provenance
from blocktune.training import resume
from blocktune.training.collator import BlockDataCollator
from blocktune.training.lora import require_named_base, require_reproducible, trained_adapters
from blocktune.training.resume import CONFIG_FILE

STAGING = ".saving"
# What an evaluation measures without `compute_metrics`; the last three with a teacher.
METRICS = ("loss", "mean_token_accuracy", "cross_entropy", "divergence", "states")


def settings(args: Any) -> dict[str, Any]:
    """All settings of a trainer, without secrets."""
    return {k: v for k, v in args.to_sanitized_dict().items() if not k.endswith("token")}


def adapter_info(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, **fields: Any
) -> AdapterInfo:
    """The `AdapterInfo` of a model (bare or PEFT), before link tokens are added to it."""
    config = model.config.get_text_config()
    return AdapterInfo(
        base_model=model.config._name_or_path or model.config.model_type,
        base_revision=getattr(model.config, "_commit_hash", None),
        quantization=quantization_of(model),
        rope=dict(config.rope_parameters or {}),
        base_fingerprint=base_fingerprint(model),
        tokenizer_hash=tokenizer_hash(tokenizer),
        **fields,
    )


@dataclass(frozen=True)
class AdapterFiles:
    """Writes blocktune's own files, and the weights, into an adapter's folder."""

    info: AdapterInfo  # becomes ``blocktune.json``
    config: Mapping[str, Any] = field(default_factory=dict)  # becomes `CONFIG_FILE`
    links_only: bool = False  # the base is frozen and has no PEFT adapter, so it is not written

    def described(self, config: Mapping[str, Any] | None = None, **training: Any) -> AdapterFiles:
        """A copy with more settings and more provenance of the run (``training``)."""
        info = replace(self.info, training=self.info.training | training)
        return replace(self, info=info, config={**(config or {}), **self.config})

    def write_weights(self, model: nn.Module, folder: Path, state: dict[str, Tensor] | None):
        """Writes the trained weights of an unwrapped model (by ``state`` if sharded), not links."""
        if hasattr(model, "peft_config"):
            # By default PEFT writes whole embeddings after a resize, not just the trained rows.
            options = {"save_embedding_layers": False, "selected_adapters": trained_adapters(model)}
            model.save_pretrained(folder, state_dict=state, **options)
        elif not self.links_only:
            state = model.state_dict() if state is None else state
            kept = {name: w for name, w in state.items() if not name.startswith(links.LINKS_MODULE)}
            model.save_pretrained(folder, state_dict=kept)

    def complete(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        folder: Path,
        state: dict[str, Tensor] | None,
    ) -> None:
        """Adds tokenizer, links, settings, and last ``blocktune.json`` to an adapter's folder."""
        for name in trained_adapters(model):  # PEFT writes others than "default" one folder below
            if name != "default" and (folder / name).is_dir():
                move_entries(folder / name, folder, last=PEFT_FILE)
        tokenizer.save_pretrained(folder)
        if (table := links.installed_links(model)) is not None:
            own = {f"{links.LINKS_MODULE}.weight": table.weight} if state is None else state
            [weight] = [w for n, w in own.items() if n.endswith(f"{links.LINKS_MODULE}.weight")]
            links.save_links(links.table_of(weight), folder)
        (folder / CONFIG_FILE).write_text(yaml.safe_dump(dict(self.config), sort_keys=False))
        info = self.info
        if not self.links_only and not hasattr(model, "peft_config"):
            info = replace(
                info,
                base_model=OWN_WEIGHTS,
                base_fingerprint=base_fingerprint(model, state),
                # With added tokens, since the saved tokenizer is now the base's.
                tokenizer_hash=tokenizer_hash(read_tokenizer(folder)),
                training={**info.training, "started_from": info.base_model},
            )
        info.save(folder)


class SaveLayoutCallback(TrainerCallback):
    """Adds the files that serving needs to the adapter of any trainer.

    Whenever the trainer saves the model, this writes the tokenizer, ``links.safetensors`` and
    ``blocktune.json`` to the same folder, so that `Engine.from_pretrained` can load it.
    """

    def __init__(self, collator: BlockDataCollator):
        """Takes the trainer's collator, which has the layout and format of prompts."""
        self.collator = collator
        self._has_layout = False  # whether a forward pass of the run had one

    def on_init_end(self, args, state, control, model=None, **kwargs):
        """Makes `save_pretrained` of the trainer's model write the files, too."""
        require_reproducible(model)
        collator, tokenizer = self.collator, self.collator.tokenizer
        if (last := kwargs.get("processing_class")) is not None:  # TRL's is the base's
            last.save_pretrained = tokenizer.save_pretrained
        collator.num_tokens = links.link_base(model)
        fields = {"layout": collator.layout, "format": collator.format, "scope": scope_of(model)}
        info = adapter_info(model, tokenizer, **fields, training=provenance(args.seed))
        save, selected = model.save_pretrained, {}
        if names := trained_adapters(model):
            info = replace(info, base_fingerprint=require_named_base(model))
            selected = {"selected_adapters": names}
        self._served = {name: info.to_dict()[name] for name in fields}
        files = AdapterFiles(info, {"training": settings(args)})

        def save_pretrained(folder, *rest, **options):
            save(folder, *rest, **(selected | options))
            if options.get("is_main_process", True):
                files.complete(model, tokenizer, Path(folder), options.get("state_dict"))

        model.save_pretrained = save_pretrained

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        """Raises ValueError if the model would ignore the layout, or began with another one."""
        if not is_attached(model):
            raise ValueError("the model ignores layouts; call blocktune.attach(model) first")
        # A checkpoint keeps the state, so a run that continues brings what it began with.
        before = state.stateful_callbacks.setdefault("blocktune", self._served)
        for name, new in self._served.items():
            if (old := before[name]) != new:
                raise ValueError(
                    f"the checkpoint of step {state.global_step} was trained with {name} {old}, "
                    f"now it is {new}; restore it, or train without resume_from_checkpoint"
                )
        self._watch = decoder_of(model).register_forward_pre_hook(self._see, with_kwargs=True)

    def _see(self, decoder, args, kwargs) -> None:
        self._has_layout |= not {"layout", "plan"}.isdisjoint(kwargs)

    def on_step_end(self, args, state, control, **kwargs):
        """Raises ValueError after the first step if none of its batches had a layout."""
        self._watch.remove()
        if not self._has_layout:
            raise ValueError("no batch had a layout; pass data_collator=collator to an SFT trainer")


class StagedSaving(Trainer):
    """Saves through a staging folder: a checkpoint gets its name once every rank has written."""

    files: AdapterFiles
    _staging: bool = False
    _replaces: bool = False  # whether the first save removes an earlier run
    _earlier_best: str | None = None  # best checkpoint of the run that this one continues
    _best: bool = False  # whether the weights are those of the best checkpoint, not the last step

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Trains as the Trainer does, after removing the partial files of a killed run.

        Raises ValueError if the checkpoint is damaged or of another run, or the data makes no step.
        """
        metric = self.args.metric_for_best_model or "loss"
        own = not type(self).evaluate.__module__.startswith("blocktune.")
        adds_others = own or self.compute_metrics is not None or self.args.eval_strategy == "no"
        if not adds_others and not metric.endswith(METRICS):
            raise ValueError(f"metric_for_best_model must be one of {METRICS}, got '{metric}'")
        with alone_in(self.args.output_dir, self.is_world_process_zero()):
            self._best, self._earlier_best = False, None
            self._replaces = self.args.overwrite and not resume_from_checkpoint
            if resume_from_checkpoint:
                self._continue_from(resume_from_checkpoint)
            if self.args.should_save:
                shutil.rmtree(Path(self.args.output_dir) / STAGING, ignore_errors=True)
            self.accelerator.wait_for_everyone()
            result = super().train(resume_from_checkpoint, **kwargs)
        if not self.state.global_step:
            rows = f"{len(self.train_dataset)} rows are less than one batch"
            raise ValueError(f"nothing was trained: {rows}; leave out dataloader_drop_last")
        return result

    def _continue_from(self, named: str | bool) -> None:
        """Checks a checkpoint (True: the last one), and adopts its provenance."""
        folder = self.args.output_dir
        checkpoint = resume.last_checkpoint(folder) if named is True else Path(named)
        if checkpoint is None or not (checkpoint / INFO_FILE).is_file():
            raise ValueError(f"no checkpoint of blocktune at '{checkpoint or folder}'")
        resume.require_loadable(checkpoint)
        model, config = self.model, dict(self.files.config)
        for name in trained_adapters(model):
            config["adapter"] = resume.adapter_settings(model.peft_config[name].to_dict())
        resume.require_same_run(checkpoint, config, self.accelerator.num_processes)
        before, now = AdapterInfo.load(checkpoint), self.files.info
        other_rows = before.training.get("data_digest") != now.training.get("data_digest")
        same_name = before.base_model == now.base_model
        if other_rows or (same_name and before.base_fingerprint != now.base_fingerprint):
            name = "training examples" if other_rows else "base model"
            raise ValueError(f"the {name} changed since '{checkpoint}'; restore it, or --overwrite")
        self.files = self.files.described(**resume.history(checkpoint))
        best = resume.best_checkpoint(checkpoint, Path(folder))
        if best is not None and best.is_dir():
            self._earlier_best = str(best)
        elif best is not None and self.args.load_best_model_at_end:
            raise ValueError(
                f"the best checkpoint, '{best}', is not there; restore it, or set "
                "load_best_model_at_end: false"
            )

    def _init_training_state(self, *args: Any) -> Any:
        done = super()._init_training_state(*args)
        # transformers forgets the best checkpoint of a run that was moved, and then deletes it.
        self.state.best_model_checkpoint = self._earlier_best
        return done

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Compares only the steps that are saved, since only they can be loaded at the end."""
        is_saved = self.control.should_save or self.args.save_strategy == SaveStrategy.BEST
        if self.args.load_best_model_at_end and not is_saved:
            return False
        return super()._determine_best_metric(metrics, trial)

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
        run_dir = Path(self._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        staged, target = run_dir / STAGING / name, run_dir / name
        if self.state.best_model_checkpoint == str(staged):
            self.state.best_model_checkpoint = str(target)
        if self.args.should_save:
            self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
            self._remove_earlier(run_dir)
            move_folder(staged, target)
            others = [p.stat().st_mtime for p in run_dir.glob("checkpoint-*") if p != target]
            if target.stat().st_mtime <= (newest := max(others, default=0.0)):
                os.utime(target, (newest + 1, newest + 1))  # by a clock that was ahead
            rotate_checkpoints(
                output_dir=str(run_dir),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        self.accelerator.wait_for_everyone()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapter to ``output_dir``, with ``blocktune.json`` last."""
        target = Path(output_dir or self.args.output_dir)
        if _internal_call:
            super().save_model(str(target), _internal_call=True)
            return
        super().save_model(str(target / STAGING / "adapter"), _internal_call=True)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            self._remove_earlier(target)
            move_entries(target / STAGING / "adapter", target, last=INFO_FILE)
            (target / STAGING).rmdir()

    def _remove_earlier(self, folder: Path) -> None:
        """Removes the run that this one replaces; called when this one has something to keep."""
        if self._replaces and folder == Path(self.args.output_dir):
            resume.remove_run(folder)
            self._replaces = False

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        model = self.accelerator.unwrap_model(self.model)
        self.files.write_weights(model, folder, state_dict)
        torch.save(self.args, folder / TRAINING_ARGS_NAME)
        steps = self.state.best_global_step if self._best else self.state.global_step
        files = self.files.described(steps=steps)
        files.complete(model, self.processing_class, folder, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        if _has_model(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_links(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        best = self.state.best_model_checkpoint
        if _has_model(best):
            super()._load_best_model()
        self._load_links(best)
        self._best = True

    def _load_links(self, folder: str) -> None:
        table = links.installed_links(self.accelerator.unwrap_model(self.model))
        if table is not None:
            weight, saved = table.weight, links.load_links(folder).weight
            with torch.no_grad():
                fill(weight, saved.to(weight.device, weight.dtype))


def _has_model(folder: str) -> bool:
    return {path.name for path in Path(folder).glob("*.safetensors")} != {links.LINKS_FILE}
