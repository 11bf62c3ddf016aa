"""Continues the run in an output folder with the same command, and refuses other settings."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from blocktune.adapter import INFO_FILE, AdapterInfo
from blocktune.adapter.load import PEFT_FILE, require_whole
from blocktune.parsing import load_json, load_yaml, parse_yaml

CONFIG_FILE = "resolved_config.yaml"  # all settings of a run, by group
_INERT = re.compile(
    "output_dir|overwrite|dry_run|use_cpu|run_name|project|prediction_loss_only|disable_tqdm|debug|"
    "skip_memory_metrics|do_|local_rank|ddp_|deepspeed|fsdp|accelerator_config|parallelism_config|"
    "(resume|restore|save|enable_jit)_|(log|logging|report|trackio|hub|push)_|"
    "(per_device_)?eval_|batch_eval|include_|metric_for|greater_is|load_best|"
    "dataloader_(num|pin|prefetch|persistent|in_order|multi)|dataset_num_proc|torch_empty|"
    "(bf16|fp16)_full_eval|inference_mode|base_model_name|revision|peft_version|"
    "gradient_checkpointing|activation_|(per_device_)?train_batch_size|gradient_accumulation_steps"
)
"""Settings that may change when a run continues, since they do not affect the trained weights."""
_LENGTH = ("max_steps", "num_train_epochs")
_ROWS = ("per_device_train_batch_size", "gradient_accumulation_steps")
_TRACES = ("command", "commit", "versions", "hardware", "world_size", "launch")  # of every start


def last_checkpoint(folder: str | Path) -> Path | None:
    """The newest checkpoint in a run's folder, or None."""
    checkpoint = get_last_checkpoint(str(folder)) if Path(folder).is_dir() else None
    return None if checkpoint is None else Path(checkpoint)


def is_finished(folder: Path, config: Mapping[str, Any]) -> bool:
    """Whether the run in this folder has ended, and these settings do not make it longer."""
    if not all((folder / name).is_file() for name in (INFO_FILE, TRAINER_STATE_NAME)):
        return False
    if last_checkpoint(folder) is None or config["training"]["lr_scheduler_type"] != "constant":
        return True
    old, new = _settings_of(folder)["training"], config["training"]
    return not any(new[key] > old[key] for key in _LENGTH)


@contextmanager
def stoppable(output_dir: str | Path, overwrite: bool) -> Iterator[None]:
    """On Ctrl-C inside the block, reports the last checkpoint and how to continue."""
    started, how = (time.time(), " without --overwrite") if overwrite else (0.0, "")
    try:
        yield
    except KeyboardInterrupt:
        kept = " (the earlier run is unchanged)" if overwrite else ""
        line = f"no checkpoint is saved yet{kept}; repeat the command to start again"
        last = last_checkpoint(output_dir)
        if last is not None and last.stat().st_mtime > started:
            line = f"the last checkpoint is {last}; repeat the command{how} to continue"
        raise KeyboardInterrupt(line) from None


def require_same_run(
    folder: Path, config: Mapping[str, Any], world_size: int | None = None
) -> None:
    """Raises ValueError if a run's settings differ from those in ``folder``, and names them all.

    ``folder`` is a checkpoint, or that of a finished run. Only groups of settings that both have
    are compared, since a `BlockSFTTrainer` knows no data source.
    """
    old, new = _settings_of(folder), parse_yaml(yaml.safe_dump(dict(config)), CONFIG_FILE)
    changed = list(_differences(old, new))
    if world_size is not None:
        rows = _rows_per_step(old, _training(folder).get("world_size", 1))
        if rows != (now := _rows_per_step(new, world_size)):
            changed.append(f"rows in a step {rows} -> {now} ({' x '.join(_ROWS)} x processes)")
    if changed:
        raise ValueError(
            f"'{folder}' was trained with other settings: {'; '.join(changed)}. Repeat the old "
            "ones, choose another output_dir, or start again with --overwrite"
        )


def adapter_settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """PEFT's settings as plain values, and lists, whose order varies, sorted; no nested ones."""
    lists = {k: sorted(map(str, v)) for k, v in config.items() if isinstance(v, list | set)}
    return {k: v for k, v in config.items() if type(v) in (str, bool, int, float)} | lists


def _settings_of(folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).is_file():
        raise ValueError(
            f"'{folder}' has no {CONFIG_FILE}, so its settings are unknown; choose another "
            "output_dir, or start again with --overwrite, which removes it"
        )
    found = load_yaml(folder / CONFIG_FILE, "settings", _FIX)
    is_grouped = isinstance(found, dict) and all(isinstance(g, dict) for g in found.values())
    if not is_grouped or not {*_ROWS, *_LENGTH} <= found.get("training", {}).keys():
        raise ValueError(f"'{folder / CONFIG_FILE}' does not have the settings of a run; {_FIX}")
    if (folder / PEFT_FILE).is_file():
        found["adapter"] = adapter_settings(load_json(folder / PEFT_FILE))
    return found


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    # With a constant learning rate, a longer run has the same steps up to now.
    is_constant = new["training"]["lr_scheduler_type"] == "constant"
    for group in old.keys() & new.keys():
        before, now = old[group], new[group]
        for key in sorted(before.keys() & now.keys()):
            longer = is_constant and key in _LENGTH and now[key] > before[key]
            if before[key] != now[key] and not longer and not _INERT.match(key):
                yield f"{key} {before[key]!r} -> {now[key]!r}"


def _rows_per_step(config: Mapping[str, Any], world_size: int) -> int:
    return world_size * math.prod(config["training"][key] for key in _ROWS)


_FIX = "remove the checkpoint to continue from the previous one, or start again with --overwrite"
_STATES = {
    "optimizer state": ("optimizer.pt", "optimizer.bin", "optimizer_*", "global_step*"),
    "learning rate schedule": ("scheduler.pt", "global_step*"),
    "random states": ("rng_state*.pth",),
}
"""Files of a checkpoint. If one is missing, transformers would silently restart that part."""


def require_loadable(checkpoint: Path) -> None:
    """Raises ValueError if a file of a checkpoint is truncated or missing; names the file."""
    for part, patterns in _STATES.items():
        if not any(any(checkpoint.glob(pattern)) for pattern in patterns):
            raise ValueError(f"'{checkpoint}' lacks the {part} ({patterns[0]}); {_FIX}")
    for path in sorted(checkpoint.rglob("*")):
        is_archive = path.suffix in (".pt", ".pth", ".bin")  # torch.save writes zip files
        if is_archive and not zipfile.is_zipfile(path):
            raise ValueError(f"'{path}' is damaged or incomplete; {_FIX}")
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        require_whole(checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(f"'{checkpoint}' is damaged or incomplete: {error}; {_FIX}") from None


def best_checkpoint(checkpoint: Path, run: Path) -> Path | None:
    """The best one so far, which is beside ``checkpoint``: in the folder ``run``, or elsewhere."""
    best = json.loads((checkpoint / TRAINER_STATE_NAME).read_text()).get("best_model_checkpoint")
    folder = run if run.is_dir() and run.samefile(checkpoint.parent) else checkpoint.parent
    return best and folder / Path(best).name


def history(checkpoint: Path) -> dict[str, Any]:
    """Provenance of a run that continues: the current step, and all earlier starts."""
    training = _training(checkpoint)
    step = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["global_step"]
    before = {key: training[key] for key in _TRACES if key in training}
    before |= {"from_step": training.get("from_step", 0), "until_step": step}
    return {"from_step": step, "earlier": [*training.get("earlier", ()), before]}


def _training(folder: Path) -> Mapping[str, Any]:
    try:
        return AdapterInfo.load(folder).training
    except ValueError as error:
        raise ValueError(f"{error}; {_FIX}") from None


def remove_run(folder: Path) -> None:
    """Removes the adapter and the checkpoints of an earlier run, and no other files."""
    own = [PEFT_FILE, CONFIG_FILE, TRAINER_STATE_NAME]
    if (folder / INFO_FILE).is_file():  # also what only a full model has
        own += ["*.safetensors", "*.safetensors.index.json", CONFIG_NAME, GENERATION_CONFIG_NAME]
    (folder / INFO_FILE).unlink(missing_ok=True)  # first: without it nothing loads
    for path in folder.glob("checkpoint-*"):
        if re.fullmatch(r"checkpoint-\d+", path.name):
            shutil.rmtree(path)
    for path in [path for pattern in own for path in folder.glob(pattern)]:
        path.unlink()
