"""One training run, the same for `blocktune train` and for `recipes/train.py`.

Reads the options, loads base and data, hands them to `BlockSFTTrainer`, trains, saves, publishes.
"""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import ModelConfig, TrlParser, get_peft_config, get_quantization_config

from blocktune.data import load_examples
from blocktune.data.mixture import BLOCK, load_mixture, mix
from blocktune.data.sources.load import training_split
from blocktune.models import load
from blocktune.prompt import LayoutSpec, PromptFormat
from blocktune.training import launch_checks
from blocktune.training.checkpoint import settings
from blocktune.training.collator import BlockDataCollator
from blocktune.training.config import BlockSFTConfig, DataArgs
from blocktune.training.console import LogLines
from blocktune.training.dataset import Sample, in_modes
from blocktune.training.plan import make_plan, print_plan
from blocktune.training.trainer import BlockSFTTrainer


class Parser(TrlParser):
    """TRL's parser over all options of a run; what is typed wins over the YAML.

    Args:
        argv: Command line without the program's name.
    """

    def __init__(self, argv: Sequence[str] = ()):
        super().__init__(
            (DataArgs, BlockSFTConfig, ModelConfig), prog="blocktune train", allow_abbrev=False
        )
        self._typed = {word.partition("=")[0].replace("-", "_") for word in argv}

    def set_defaults_with_config(self, **values):
        """Takes what the YAML says, but for the source of examples if another one is typed."""
        one_source, mixture = {"train_data", "train_limit"}, {"mixture"}
        for typed, instead in (("__mixture", one_source), ("__train_data", mixture)):
            if typed in self._typed:
                values = {key: value for key, value in values.items() if key not in instead}
        return super().set_defaults_with_config(**values)

    def error(self, message: str):
        """Raises ValueError, where argparse prints its usage and exits."""
        raise ValueError(message)


def parse(argv: Sequence[str]) -> tuple[DataArgs, BlockSFTConfig, ModelConfig]:
    """Reads ``--config FILE`` and the options that override it.

    Raises:
        ValueError: On an unknown key or option, a value of the wrong type, or a missing file.
    """
    if argv and Path(argv[0]).suffix in (".yaml", ".yml"):
        raise ValueError(f"unexpected argument '{argv[0]}'; did you mean '--config {argv[0]}'?")
    parser = Parser(argv)
    try:
        *parsed, unknown = parser.parse_args_and_config(list(argv), return_remaining_strings=True)
    except OSError as error:
        raise ValueError(f"cannot read the config: {error}") from None
    if unknown:
        name = next((word for word in unknown if word.startswith("--")), unknown[0])
        known = [action.dest for action in parser._actions]
        close = difflib.get_close_matches(name.lstrip("-"), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "see blocktune train --help-all"
        raise ValueError(f"unknown key or option '{name.lstrip('-')}'; {hint}")
    return tuple(parsed)


def train(
    argv: Sequence[str],
    callbacks: Sequence[TrainerCallback] = (),
    publisher: Publisher | None = None,
) -> Path | None:
    """Trains as told, saves the adapter, and publishes it where ``push_to_hub`` says so.

    Args:
        argv: Command line without the program's name, e.g. ``["--config", "run.yaml"]``.
        callbacks: More callbacks of transformers' Trainer, e.g. evaluation.
        publisher: What ``push_to_hub`` is served by.

    Returns:
        The adapter's folder, or None after a dry run.

    Raises:
        ValueError: On anything a user can mend, in one line.
    """
    data, args, choice = parse(argv)
    repo = checked_repo(args, choice.model_name_or_path, publisher)
    folder = _train(data, args, choice, callbacks)
    if repo and folder and os.environ.get("RANK", "0") == "0":
        publisher.publish(folder, repo, bool(args.hub_private_repo), args.hub_token)
    return folder


def _train(data, args, choice, callbacks) -> Path | None:
    launch_checks.refuse_unasked_evaluation(data.eval_data, args)
    folder = Path(args.output_dir)
    was_there = folder.exists()
    trainer = build(data, args, choice, callbacks)
    if trainer.is_world_process_zero():
        print_plan(make_plan(trainer))
    if args.dry_run:
        if not was_there:  # the Trainer makes it, and an empty folder looks like a lost run
            with contextlib.suppress(OSError):
                folder.rmdir()
        return None
    trainer.train(resume_from_checkpoint=_resume(args.resume_from_checkpoint))
    trainer.save_model()
    trainer.save_state()
    return folder


def _resume(value: str | bool | None) -> str | bool | None:
    """YAML and the command line say true in several ways; a path is left as it is."""
    with contextlib.suppress(AttributeError):
        return {"true": True, "false": None, "": None}.get(value.lower(), value)
    return value or None


def build(
    data: DataArgs,
    args: BlockSFTConfig,
    choice: ModelConfig,
    callbacks: Sequence[TrainerCallback] = (),
) -> BlockSFTTrainer:
    """Loads base and data and makes the trainer."""
    launch_checks.refuse_missing_trackers(args.report_to)
    launch_checks.refuse_frozen_quantised(args, choice)
    model, tokenizer = load_base(choice)
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
    """Every setting of a run, by group, as ``resolved_config.yaml`` holds it."""
    return {"data": vars(data).copy(), "model": vars(choice).copy(), "training": settings(args)}


def load_base(choice: ModelConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads the base and its tokenizer by TRL's `ModelConfig`.

    Raises:
        ValueError: If no model is named, it cannot be loaded, or an attention implementation is
            asked for: blocktune attaches its own.
    """
    name = choice.model_name_or_path
    if not name:
        raise ValueError("model_name_or_path is missing; name a folder or a Hub repository")
    if choice.attn_implementation is not None:
        raise ValueError(
            f"attn_implementation '{choice.attn_implementation}' does not support layouts; leave "
            "it out and choose attention_execution: split, flex or dense"
        )
    quantised = choice.load_in_4bit or choice.load_in_8bit
    if quantised and choice.dtype in (None, "auto"):
        raise ValueError(
            "a quantised base needs an explicit dtype to compute in; set dtype: bfloat16 "
            "(on GPUs) or dtype: float32 (on CPUs)"
        )
    return load.load_base(
        name,
        dtype=choice.dtype or "auto",
        device=str(PartialState().device),  # each process quantises onto its own
        revision=choice.model_revision,
        quantize=get_quantization_config(choice),
        place=False,
        what="base model",
    )


def samples_of(
    data: DataArgs, args: BlockSFTConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Sample]:
    """The training examples and the modes they are trained in.

    Raises:
        ValueError: If a mixture and the options of one source are mixed, or disagree.
    """
    if data.mixture is None:
        source, split = data.train_data, training_split(data.train_data)
        examples = load_examples(source, limit=data.train_limit, split=split, tokenizer=tokenizer)
        return in_modes(examples, args.block_share, args.both_modes, args.seed)
    if args.both_modes:
        raise ValueError("a mixture says the mode of each source; leave both_modes out")
    mixture = load_mixture(data.mixture)
    # A part's own wording: what it does not say is the run's.
    run = data.format.to_dict()
    worded = [p.format and PromptFormat.from_dict(run | dict(p.format)) for p in mixture.parts]
    samples = [
        Sample(one.example, one.mode == BLOCK, worded[one.part], mixture.parts[one.part].turns)
        for one in mix(mixture, tokenizer=tokenizer).examples
    ]
    if args.has_block != any(sample.block for sample in samples):
        wanted = "0 (full attention alone)" if args.has_block else "left out"
        raise ValueError(f"the mixture's modes and block_share disagree: it should be {wanted}")
    return samples


_PUSH_OPTIONS = {
    "hub_strategy": ("every_save", "end"),  # transformers' default, and what is done
    "hub_always_push": (False,),
    "hub_revision": (None,),
}
"""Options of transformers' own push that a single push at the end would ignore."""


class Publisher(Protocol):
    """Publishes adapters; handed in, since training knows nothing of serving and checking.

    ``check`` refuses before a run what ``publish`` could not publish after it.
    """

    check: Callable[[str, str, LayoutSpec, str | None], None]
    """Repository, base model, layout and token."""
    publish: Callable[[Path, str, bool, str | None], None]
    """Folder, repository, whether it is private, and token."""


def checked_repo(args: BlockSFTConfig, base_model: str, publisher: Publisher | None) -> str | None:
    """Where a run is pushed to, or None; the Trainer, which would push unchecked, is not told.

    Raises:
        ValueError: If it cannot be pushed, or not as the options say.
    """
    if not args.push_to_hub:
        return None
    if publisher is None or not args.hub_model_id:
        raise ValueError(
            "push_to_hub needs hub_model_id: USER/NAME, and a program that publishes: "
            "`blocktune train` or recipes/train.py"
        )
    for name, accepted in _PUSH_OPTIONS.items():
        if (value := getattr(args, name)) not in accepted:
            raise ValueError(
                f"{name}: {getattr(value, 'value', value)} is not supported; push_to_hub pushes "
                "once, when the run is over, to the main branch; leave it out"
            )
    publisher.check(args.hub_model_id, base_model, args.layout, args.hub_token)
    args.push_to_hub = False
    return args.hub_model_id
