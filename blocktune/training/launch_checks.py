"""Checks before a run: settings and launches that would fail, or train something else."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, parse_flag_from_env
from transformers.integrations import get_reporting_integration_callbacks
from transformers.optimization import get_scheduler
from transformers.trainer_utils import IntervalStrategy
from trl import ModelConfig, SFTConfig

from blocktune.data.sources.catalog import is_test_split


def say(line: str) -> None:
    """Prints a line, once for all processes; if the pipe is closed (``| head``), no more."""
    if os.environ.get("RANK", "0") == "0":
        try:
            print(line, flush=True)
        except BrokenPipeError:  # a run must not end for this
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def launch_name(accelerator: Accelerator) -> str:
    """The actual kind of parallelism, e.g. ``DEEPSPEED stage 3``."""
    kind, state = accelerator.distributed_type, accelerator.state
    if kind == DistributedType.DEEPSPEED:
        return f"{kind.value} stage {state.deepspeed_plugin.zero_stage}"
    if kind == DistributedType.FSDP:
        return f"{kind.value} version {state.fsdp_plugin.fsdp_version}"
    return kind.value


def refuse_late_failures(args: SFTConfig) -> None:
    """Raises ValueError for trackers and a schedule that would fail once the model is loaded."""
    names = args.report_to
    for name, callback in zip(names, get_reporting_integration_callbacks(names), strict=True):
        try:
            callback()
        except (RuntimeError, ImportError) as error:
            reason = f"report_to: {name} cannot be used ({str(error).strip()})"
            raise ValueError(f"{reason}; install it, or set report_to: none") from None
    kind, given = args.lr_scheduler_type, dict(args.lr_scheduler_kwargs or {})
    optimizer = torch.optim.SGD([torch.zeros(1)], args.learning_rate)
    try:
        get_scheduler(kind, optimizer, 1, 2, scheduler_specific_kwargs=given)
    except (TypeError, ValueError) as error:
        what = f"lr_scheduler_type '{kind.value}' does not fit lr_scheduler_kwargs {given}"
        raise ValueError(f"{what}: {error}") from None


def refuse_test(source: str, split: str | None = None) -> None:
    """Raises ValueError for a test split, which is reserved for evaluation."""
    if is_test_split(source, split):
        raise ValueError(f"'{source}' is a test split; train on another, such as '?split=train'")


def refuse_settings(source: str | None, args: SFTConfig, choice: ModelConfig) -> None:
    """Raises ValueError for settings that exclude each other; ``source`` is for evaluation."""
    if not choice.model_name_or_path:
        raise ValueError("model_name_or_path is missing; name a folder or a Hub repository")
    evaluates = args.eval_strategy != IntervalStrategy.NO or args.eval_on_start
    if source and not evaluates:
        raise ValueError(f"eval_data '{source}' would never be used, since eval_strategy is 'no'")
    if evaluates and not source:
        raise ValueError("evaluation needs questions; name their source in eval_data")
    quantised = choice.load_in_4bit or choice.load_in_8bit
    if args.freeze_base and quantised:
        raise ValueError("freeze_base cannot train a quantized base without an adapter; drop it")
    if (kind := choice.attn_implementation) is not None:
        raise ValueError(f"attn_implementation '{kind}' does not support layouts; leave it out")
    if quantised and choice.dtype in (None, "auto"):
        raise ValueError("a quantized base needs a dtype to compute in, such as dtype: bfloat16")


def refuse_launch(accelerator: Accelerator, uses_deepspeed: bool) -> None:
    """Raises ValueError for a launch that would train otherwise than it was asked to."""
    for kind in ("cp", "sp"):
        if getattr(accelerator.parallelism_config, f"{kind}_enabled", False):
            raise ValueError(f"{kind}_size > 1 drops the layout's mask; set {kind}_size to 1")
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"the launcher started {started} processes, but each would train alone; launch them "
            "by `blocktune train --processes` or with a configuration of recipes/accelerate"
        )
    uses_fsdp = accelerator.distributed_type == DistributedType.FSDP
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") and not uses_deepspeed:
        raise ValueError(
            "the launcher asked for DeepSpeed, but the Trainer runs without it; launch with "
            "recipes/accelerate/zero2.yaml and set no deepspeed option in the recipe"
        )
    if parse_flag_from_env("ACCELERATE_USE_FSDP") and not uses_fsdp:
        raise ValueError(
            "the launcher asked for FSDP, which accelerate supports only on GPUs: on CPUs it would "
            "train with plain DDP; use recipes/accelerate/ddp.yaml, zero2.yaml or zero3.yaml"
        )


def save_whole(accelerator: Accelerator) -> None:
    """Makes FSDP and ZeRO-3 save whole weights, of which adapters and models are made."""
    state = accelerator.state
    if accelerator.distributed_type == DistributedType.FSDP:
        state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    elif accelerator.distributed_type == DistributedType.DEEPSPEED:
        zero = state.deepspeed_plugin.deepspeed_config["zero_optimization"]
        zero["stage3_gather_16bit_weights_on_model_save"] = True


def wait_for_builds() -> None:
    """Waits for builds of DeepSpeed's operators by other processes, and reports it.

    Raises ValueError for the lock of a killed build, for which DeepSpeed would wait forever.
    """
    from torch.utils.cpp_extension import get_default_build_root  # seconds to import

    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root())
    for lock in sorted({*root.glob("*/lock"), *root.glob("*/*/lock")}):
        if _is_held(lock):
            say(f"waiting for another process to build an operator: {lock}")
        while _is_held(lock):
            time.sleep(1)
        if lock.exists():
            raise ValueError(f"a build of DeepSpeed was stopped and left its lock: rm '{lock}'")


def _is_held(lock: Path) -> bool:
    """Whether a process has the file open, as torch does during a build."""
    for link in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):  # the process ended, or is another user's
            if os.readlink(link) == str(lock.resolve()):
                return True
    return False
