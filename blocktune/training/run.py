"""One training run, the same for `blocktune train` and for `recipes/train.py`."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Sequence
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import ModelConfig, TrlParser

from blocktune.data import load_examples
from blocktune.training.checkpoint import AdapterFiles
from blocktune.training.collator import BlockCollator
from blocktune.training.config import BlockSFTConfig, DataArgs
from blocktune.training.dataset import Prepared, prepare
from blocktune.training.plan import LogLines, make_plan_of, print_plan
from blocktune.training.prepare import Ready, load_base, make_ready
from blocktune.training.provenance import provenance
from blocktune.training.trainer import BlockSFTTrainer


def parse(argv: Sequence[str]) -> tuple[DataArgs, BlockSFTConfig, ModelConfig]:
    """Reads ``--config FILE`` and the options that override it.

    Raises:
        ValueError: On an unknown key or option, a value of the wrong type, or a missing file.
    """
    parser = TrlParser((DataArgs, BlockSFTConfig, ModelConfig), prog="blocktune train")
    parser.error = _raise
    try:
        *parsed, unknown = parser.parse_args_and_config(list(argv), return_remaining_strings=True)
    except OSError as error:
        raise ValueError(f"cannot read the config: {error}") from None
    if unknown:
        name = next((word for word in unknown if word.startswith("--")), unknown[0])
        known = [action.dest for action in parser._actions]
        close = difflib.get_close_matches(name.lstrip("-"), known, n=1)
        hint = f"did you mean '{close[0]}'?" if close else "see blocktune/training/config.py"
        raise ValueError(f"unknown key or option '{name.lstrip('-')}'; {hint}")
    return tuple(parsed)


def train(argv: Sequence[str], callbacks: Sequence[TrainerCallback] = ()) -> Path | None:
    """Trains as told and saves the adapter.

    Args:
        argv: Command line without the program's name, e.g. ``["--config", "run.yaml"]``.
        callbacks: More callbacks of transformers' Trainer, e.g. evaluation.

    Returns:
        The adapter's folder, or None after a dry run.

    Raises:
        ValueError: On anything a user can mend, in one line.
    """
    data, args, choice = parse(argv)
    trainer, prepared = build(data, args, choice, callbacks)
    if trainer.is_world_process_zero():
        print_plan(make_plan_of(trainer, prepared.num_dropped))
    if args.dry_run:
        return None
    trainer.train(resume_from_checkpoint=_resume(args.resume_from_checkpoint))
    trainer.save_model()
    trainer.save_state()
    return Path(args.output_dir)


def build(
    data: DataArgs,
    args: BlockSFTConfig,
    choice: ModelConfig,
    callbacks: Sequence[TrainerCallback] = (),
) -> tuple[BlockSFTTrainer, Prepared]:
    """Loads base and data and makes the trainer.

    Returns:
        The trainer, and the training set with the count of examples left out.

    Raises:
        ValueError: As `load_base`, `prepare` and the loaders do.
    """
    model, tokenizer = load_base(choice)
    limit = args.max_length or model.config.get_text_config().max_position_embeddings
    train_set = _prepared(data.train_data, data.train_limit, data, args, tokenizer, limit)
    eval_set = None
    if data.eval_data:
        eval_set = _prepared(data.eval_data, data.eval_limit, data, args, tokenizer, limit).dataset
    ready = make_ready(
        model, tokenizer, args, choice, data.format, _provenance(data, args, len(train_set.dataset))
    )
    trainer = BlockSFTTrainer(
        model=ready.model,
        args=args,
        files=AdapterFiles(ready.info, _resolved(data, args, choice), args.freeze_base),
        collator=_collator(ready, args),
        train_dataset=train_set.dataset,
        eval_dataset=eval_set,
        tokenizer=tokenizer,
        callbacks=[LogLines(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer, train_set


def _prepared(source, count, data: DataArgs, args: BlockSFTConfig, tokenizer, limit) -> Prepared:
    return prepare(
        load_examples(source, limit=count),
        tokenizer,
        data.format,
        args.layout,
        limit=limit,
        drop_long=args.long_examples == "drop",
        block_share=args.block_share,
        seed=args.seed,
    )


def _collator(ready: Ready, args: BlockSFTConfig) -> BlockCollator:
    tokenizer = ready.tokenizer
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return BlockCollator(args.layout, pad or 0, ready.info.link_base(ready.model, tokenizer))


def _provenance(data: DataArgs, args: BlockSFTConfig, num_examples: int) -> dict:
    return provenance() | {
        "data": data.train_data,
        "examples": num_examples,
        "seed": args.seed,
    }


def _resolved(data: DataArgs, args: BlockSFTConfig, choice: ModelConfig) -> dict:
    training = {k: v for k, v in args.to_sanitized_dict().items() if not k.endswith("token")}
    return {"data": vars(data).copy(), "model": vars(choice).copy(), "training": training}


def _resume(value: str | bool | None) -> str | bool | None:
    """YAML and the command line say true in several ways; a path is left as it is."""
    with contextlib.suppress(AttributeError):
        return {"true": True, "false": None, "": None}.get(value.lower(), value)
    return value or None


def _raise(message: str) -> None:
    raise ValueError(message)
