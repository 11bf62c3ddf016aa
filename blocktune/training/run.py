"""A training run: reads the options, loads base and data, trains, saves and publishes."""

from __future__ import annotations

import argparse
import atexit
import difflib
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from blocktune.data import load_examples
from blocktune.data.example import own_wording
from blocktune.data.mixture import BLOCK, load_mixture, mix
from blocktune.data.sources.load import training_split
from blocktune.data.sources.options import parse_source
from blocktune.models import load
from blocktune.parsing import load_yaml, mapping
from blocktune.prompt import PromptFormat
from blocktune.training import launch_checks, resume
from blocktune.training.checkpoint import settings
from blocktune.training.collator import BlockDataCollator
from blocktune.training.config import BlockSFTConfig, DataArgs
from blocktune.training.dataset import Sample, in_modes, to_sample
from blocktune.training.plan import LogLines, make_plan, print_plan
from blocktune.training.trainer import BlockSFTTrainer

_OPTIONS = (DataArgs, BlockSFTConfig, ModelConfig)
_TYPES = {name: str(t) for cls in _OPTIONS for name, t in get_type_hints(cls).items()}
_TEXTS = {
    n for n, t in _TYPES.items() if t in ("<class 'str'>", "str | None", "typing.Optional[str]")
}
_TEXTS -= {"resume_from_checkpoint"}  # which may also be true or false


class Parser(TrlParser):
    """TRL's parser for all options of a run. Options in ``argv`` override the YAML."""

    def __init__(self, argv: Sequence[str] = ()):
        super().__init__(_OPTIONS, prog="blocktune train", allow_abbrev=False, add_help=False)
        self._typed = {word.partition("=")[0].replace("-", "_") for word in argv}

    def set_defaults_from(self, path: str) -> list[str]:
        """Takes defaults from a YAML file; returns its unknown keys.

        Every value is parsed like an option. The source of examples is ignored if ``argv`` has one.
        """
        ignored = {"train_data", "train_limit"} if "__mixture" in self._typed else set()
        ignored |= {"mixture"} if "__train_data" in self._typed else set()
        found = mapping(load_yaml(path, "config", "see recipes/ for examples"), path)
        values = {key: value for key, value in found.items() if key not in ignored}
        actions = {action.dest: action for action in reversed(self._actions)}  # X before no_X
        for key in values.keys() & actions.keys():
            try:
                values[key] = self._value(actions[key], values[key])
            except (argparse.ArgumentError, ValueError) as error:
                reason = getattr(error, "message", None) or error
                raise ValueError(f"{path}: {key}: {reason}") from None
        self.set_defaults(**{key: value for key, value in values.items() if key in actions})
        return [str(key) for key in values if key not in actions]

    def _value(self, action: argparse.Action, value: Any) -> Any:
        for kind, name in ((Mapping, "dict"), (list, "list")):
            if isinstance(value, kind) and name not in _TYPES.get(action.dest, ""):
                raise ValueError(f"must be one value, got {value!r:.60}")
        if value is None and action.default is not None:
            raise ValueError(f"must have a value; leave it out for the default, {action.default}")
        if value is None or isinstance(value, Mapping):
            return value
        if isinstance(value, list):
            return [self._value(action, item) for item in value]
        if value is False and "no" in (action.choices or ()):
            return "no"  # YAML reads an unquoted no as false
        unlike = (float, bool) if action.dest in _TEXTS else float
        if action.type is str and isinstance(value, unlike):
            raise ValueError(f"must be text, got {value}; put it in quotes")
        parsed = self._get_value(action, str(value))
        self._check_value(action, parsed)
        return parsed

    def error(self, message: str):
        """Raises ValueError; argparse itself would print its usage and exit."""
        raise ValueError(message)


def parse(argv: Sequence[str]) -> tuple[DataArgs, BlockSFTConfig, ModelConfig]:
    """Reads ``--config FILE`` and the options that override it.

    Raises ValueError on unknown keys, wrong values, a missing file, or contradictory settings.
    """
    if argv and Path(argv[0]).suffix in (".yaml", ".yml") and not argv[0].startswith("-"):
        raise ValueError(f"unexpected argument '{argv[0]}'; did you mean '--config {argv[0]}'?")
    parser = Parser(argv)
    finder = argparse.ArgumentParser(allow_abbrev=False, add_help=False)
    finder.add_argument("--config")
    finder.error = parser.error
    given, rest = finder.parse_known_args(list(argv))
    unknown = parser.set_defaults_from(given.config) if given.config is not None else []
    if unknown := unknown + parser.parse_known_args(rest)[1]:
        name = next((word for word in unknown if word.startswith("--")), unknown[0])
        names = [action.dest for action in parser._actions]
        close = difflib.get_close_matches(name.lstrip("-"), names, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "see blocktune train --help-all"
        raise ValueError(f"unknown key or option '{name.lstrip('-')}'; {hint}")
    data, args, choice = parser.parse_args_into_dataclasses(rest)
    launch_checks.refuse_settings(data.eval_data, args, choice)
    if choice.model_revision == "main":  # TRL's default
        choice.model_name_or_path, revision = load.pinned(choice.model_name_or_path)
        choice.model_revision = revision or "main"
    return data, args, choice


def train(
    argv: Sequence[str], callbacks: Sequence[TrainerCallback] = (), publisher: Any = None
) -> Path | None:
    """Trains, saves the adapter, and publishes it with ``push_to_hub``.

    Args:
        argv: Command line without the program's name, e.g. ``["--config", "run.yaml"]``.
        callbacks: Additional callbacks of transformers' Trainer, e.g. evaluation.
        publisher: A `blocktune.hub.Publisher` for ``push_to_hub``, which training cannot import.

    Returns the adapter's folder, or None after a dry run. Raises ValueError for any error that a
    user can fix, in one line.
    """
    data, args, choice = parse(argv)
    atexit.register(_close_process_group)
    pushes, repo, token = args.push_to_hub, args.hub_model_id, args.hub_token
    if pushes:
        if publisher is None or not repo:
            raise ValueError("push_to_hub needs hub_model_id: USER/NAME, and `blocktune train`")
        publisher.check(repo, choice.model_name_or_path, args.layout, token)
        args.push_to_hub = False  # the Trainer would push without a check
    folder = _train(data, args, choice, callbacks)
    if pushes and folder and os.environ.get("RANK", "0") == "0":
        publisher.publish(folder, repo, bool(args.hub_private_repo), token)
    return folder


def leave() -> None:
    """Ends a launched process other than the first at once, after all its runs.

    Otherwise threads of gloo and DeepSpeed may abort it, and the launcher then ends the first one.
    """
    if os.environ.get("RANK", "0") != "0":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def _close_process_group() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _train(data, args, choice, callbacks) -> Path | None:
    folder, base = Path(args.output_dir), choice.model_name_or_path
    if folder.exists() and folder.resolve() == Path(base).resolve():
        raise ValueError(f"output_dir is the folder of the base model, '{folder}'; name another")
    checkpoint = earlier_run(data, args, choice, int(os.environ.get("WORLD_SIZE", "1")))
    if checkpoint == folder and not args.dry_run:
        launch_checks.say(finished(data, folder))
        return folder
    if checkpoint not in (None, folder):
        launch_checks.say(f"continuing from {checkpoint}; --overwrite starts again")
    if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        launch_checks.wait_for_builds()
    if args.dry_run:
        args.output_dir = tempfile.gettempdir()  # the Trainer creates its folder
    with resume.stoppable(folder, args.overwrite):
        trainer = build(data, args, choice, callbacks)
        if trainer.is_world_process_zero():
            print_plan(make_plan(trainer))
        if args.dry_run:
            return None
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        trainer.save_model()
        trainer.save_state()
        launch_checks.say(f"saved in {folder}: blocktune answer --adapter {folder}")
    return folder


def finished(data: DataArgs, folder: str | Path) -> str:
    """The line about a run that has ended, which tells if its data file is newer than the run."""
    source = Path(data.mixture or parse_source(data.train_data).name)
    ended = (Path(folder) / TRAINER_STATE_NAME).stat().st_mtime
    is_newer = source.is_file() and source.stat().st_mtime > ended
    since = f", before {source} changed" if is_newer else ""
    return f"the run is finished{since}; --overwrite starts again"


def earlier_run(
    data: DataArgs, args: BlockSFTConfig, choice: ModelConfig, world_size: int | None = None
) -> Path | None:
    """The checkpoint to continue from: None for a new run, ``output_dir`` for a finished one.

    Raises ValueError if the earlier run had other settings or, if known, another ``world_size``, or
    there is no such checkpoint.
    """
    named, folder = str(args.resume_from_checkpoint or ""), Path(args.output_dir)
    resumes = named.lower() not in ("", "false")
    if args.overwrite:
        if resumes:
            raise ValueError("overwrite starts again; leave out resume_from_checkpoint")
        return None
    config = resolved(data, args, choice)
    if resumes and named.lower() != "true":
        checkpoint, where = (Path(named) if Path(named).is_dir() else None), f"'{named}'"
    else:
        finished, where = resume.is_finished(folder, config), f"in '{folder}'"
        checkpoint = folder if finished else resume.last_checkpoint(folder)
    if checkpoint is None and resumes:
        raise ValueError(f"resume_from_checkpoint: there is no checkpoint {where}")
    if checkpoint is not None:
        resume.require_same_run(checkpoint, config, world_size)
    return checkpoint


def build(
    data: DataArgs,
    args: BlockSFTConfig,
    choice: ModelConfig,
    callbacks: Sequence[TrainerCallback] = (),
) -> BlockSFTTrainer:
    """Loads base and data and creates the trainer."""
    launch_checks.refuse_late_failures(args)
    model, tokenizer = load.load_base(
        choice.model_name_or_path,
        dtype=choice.dtype or "auto",
        device=str(PartialState().device),  # each process quantises on its own device
        revision=choice.model_revision,
        quantize=get_quantization_config(choice),
        place=False,
        what="base model",
    )
    samples, evaluation = samples_of(data, args, tokenizer), None
    if data.eval_data:
        evaluation = load_examples(data.eval_data, limit=data.eval_limit, tokenizer=tokenizer)
    trainer = BlockSFTTrainer(
        model,
        args,
        data_collator=BlockDataCollator(tokenizer, args.layout, data.format),
        train_dataset=samples,
        eval_dataset=evaluation,
        processing_class=tokenizer,
        callbacks=[LogLines(), *callbacks],
        peft_config=get_peft_config(choice),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    source = data.train_data or load_mixture(data.mixture).to_dict()
    trainer.files = trainer.files.described(resolved(data, args, choice), data=source)
    return trainer


def resolved(data: DataArgs, args: BlockSFTConfig, choice: ModelConfig) -> dict[str, dict]:
    """All settings of a run by group, as in ``resolved_config.yaml``."""
    return {"data": vars(data).copy(), "model": vars(choice).copy(), "training": settings(args)}


def samples_of(
    data: DataArgs, args: BlockSFTConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Sample]:
    """The training examples and their modes; ValueError if options contradict the mixture."""
    if data.mixture is None:
        launch_checks.refuse_test(data.train_data)
        source, split = data.train_data, training_split(data.train_data)
        examples = load_examples(source, limit=data.train_limit, split=split, tokenizer=tokenizer)
        samples = [to_sample(example, tokenizer, data.format) for example in examples]
        samples = in_modes(samples, args.block_share, args.both_modes, args.seed)
        if args.has_block and not any(sample.block for sample in samples):
            share = f"block_share {args.block_share} of {len(samples)} examples"
            raise ValueError(f"{share} leaves none in block layout; raise it, or set it to 0")
        return samples
    if args.both_modes or args.block_share not in (0, 1):
        name = "both_modes" if args.both_modes else "block_share"
        raise ValueError(f"a mixture sets the mode of each source; leave {name} out")
    mixture = load_mixture(data.mixture)
    for part in mixture.parts:
        launch_checks.refuse_test(part.source, part.split)
    # A part may override some fields of the run's format.
    run = data.format.to_dict()
    formats = [p.format and PromptFormat.from_dict(run | dict(p.format)) for p in mixture.parts]
    samples = []
    for item in mix(mixture, tokenizer=tokenizer).examples:
        own = formats[item.part]
        wording = own_wording(item.example, own or data.format) or own
        turns = mixture.parts[item.part].turns
        samples.append(Sample(item.example, item.mode == BLOCK, wording, turns))
    if args.has_block != any(sample.block for sample in samples):
        fix = "set block_share: 0" if args.has_block else "leave it out"
        raise ValueError(f"block_share contradicts the modes of the mixture; {fix}")
    return samples
