"""One training run, the same for `blocktune train` and for `recipes/train.py`."""

from __future__ import annotations

import contextlib
import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback
from trl import ModelConfig, TrlParser

from blocktune.training.build import build
from blocktune.training.config import BlockSFTConfig, DataArgs
from blocktune.training.launch_checks import refuse_unasked_evaluation
from blocktune.training.plan import make_plan_of, print_plan
from blocktune.training.publishing import Publisher, checked_repo


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
        raise ValueError(f"'{argv[0]}' stands alone; did you mean '--config {argv[0]}'?")
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
    refuse_unasked_evaluation(data.eval_data, args)
    folder = Path(args.output_dir)
    was_there = folder.exists()
    trainer, prepared = build(data, args, choice, callbacks)
    if trainer.is_world_process_zero():
        print_plan(make_plan_of(trainer, prepared))
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
