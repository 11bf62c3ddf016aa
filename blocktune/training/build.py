"""From options to a trainer: base, data, layout, objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import ModelConfig

from blocktune.data import load_examples
from blocktune.data.mixture import BLOCK, load_mixture, mix
from blocktune.data.sources import training_split
from blocktune.models.gate import require_supported
from blocktune.positions import RopeSpec
from blocktune.prompt import PromptFormat
from blocktune.provenance import provenance
from blocktune.training.checkpoint import AdapterFiles
from blocktune.training.collator import BlockCollator
from blocktune.training.config import BlockSFTConfig, DataArgs
from blocktune.training.console import LogLines
from blocktune.training.dataset import Prepared, Sample, in_modes, prepare
from blocktune.training.distillation import find_teacher
from blocktune.training.launch_checks import refuse_frozen_quantised, refuse_missing_trackers
from blocktune.training.loss import Objective
from blocktune.training.plan import describe_objective
from blocktune.training.prepare import Ready, load_base, make_ready
from blocktune.training.trainer import BlockSFTTrainer


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
        ValueError: As `refuse_missing_trackers`, `load_base`, `require_supported`, `prepare`,
            `find_teacher` and the loaders do.
    """
    refuse_missing_trackers(args.report_to)
    refuse_frozen_quantised(args, choice)
    model, tokenizer = load_base(choice)
    rope = require_supported(model)
    train_set, eval_set = _datasets(data, args, model, tokenizer)
    origin = _origin(data, args, train_set)
    ready = make_ready(model, tokenizer, args, choice, data.format, origin)
    trainer = BlockSFTTrainer(
        model=ready.model,
        args=args,
        files=AdapterFiles(ready.info, resolved(data, args, choice), args.freeze_base),
        collator=_collator(data, args, ready),
        objective=_objective(args, choice, ready, rope),
        train_dataset=train_set.dataset,
        eval_dataset=eval_set.dataset if eval_set else None,
        tokenizer=tokenizer,
        callbacks=[LogLines(), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    return trainer, train_set


def samples_of(
    data: DataArgs, args: BlockSFTConfig, tokenizer: PreTrainedTokenizerBase
) -> list[Sample]:
    """The training examples and the modes they are trained in.

    Raises:
        ValueError: If a mixture and the options of one source are mixed, or disagree.
    """
    if data.mixture is None:
        examples = load_examples(
            data.train_data,
            limit=data.train_limit,
            split=training_split(data.train_data),
            tokenizer=tokenizer,
        )
        return in_modes(examples, args.block_share, args.both_modes, args.seed)
    if args.both_modes:
        raise ValueError("a mixture says the mode of each source; leave both_modes out")
    mixture = load_mixture(data.mixture)
    worded = [_worded(data.format, part.format) for part in mixture.parts]
    samples = [
        Sample(
            drawn.example, drawn.mode == BLOCK, worded[drawn.part], mixture.parts[drawn.part].turns
        )
        for drawn in mix(mixture, tokenizer=tokenizer).examples
    ]
    if args.has_block != any(sample.block for sample in samples):
        wanted = "0 (full attention alone)" if args.has_block else "left out"
        raise ValueError(f"the mixture's modes and block_share disagree: it should be {wanted}")
    return samples


def _worded(fmt: PromptFormat, own: Mapping[str, Any] | None) -> PromptFormat | None:
    """A part's own wording: what it does not say is the run's."""
    return PromptFormat.from_dict(fmt.to_dict() | dict(own)) if own else None


def _datasets(data, args, model, tokenizer) -> tuple[Prepared, Prepared | None]:
    limit = args.max_length or model.config.get_text_config().max_position_embeddings

    def prepared(samples: list[Sample], pack_length: int | None, batch: int) -> Prepared:
        return prepare(
            samples,
            tokenizer,
            data.format,
            args.layout,
            limit=limit,
            drop_long=args.long_examples == "drop",
            pack_length=pack_length,
            position_gap=args.position_jitter,
            multiple_of=batch * args.world_size if args.world_size > 1 else 1,
            has_teacher=args.distillation.is_on,
        )

    samples = samples_of(data, args, tokenizer)
    train_set = prepared(samples, args.pack_length, args.train_batch_size)
    if not data.eval_data:
        return train_set, None
    examples = load_examples(data.eval_data, limit=data.eval_limit, tokenizer=tokenizer)
    modes = in_modes(examples, args.block_share, args.both_modes, args.seed)
    return train_set, prepared(modes, None, args.eval_batch_size)


def _collator(data: DataArgs, args: BlockSFTConfig, ready: Ready) -> BlockCollator:
    tokenizer, sampler = ready.tokenizer, args.sampler
    layers = ready.model.config.get_text_config().num_hidden_layers
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return BlockCollator(
        args.layout,
        pad or 0,
        ready.info.link_base(ready.model, tokenizer),
        augmentation=args.augmentation,
        sampler=sampler,
        check_layer=sampler.check_layer(layers) if sampler else None,
        has_teacher=args.distillation.is_on,
        seed=args.seed,
    )


def _objective(
    args: BlockSFTConfig, choice: ModelConfig, ready: Ready, rope: RopeSpec
) -> Objective:
    how = args.distillation
    frozen = args.freeze_base or choice.use_peft
    teacher = find_teacher(args.distill_teacher, how, ready.model, ready.tokenizer, frozen)
    matches_keys = how.matches_states and how.states == "kv"
    return Objective(args.attention_execution, how, teacher, rope if matches_keys else None)


def _origin(data: DataArgs, args: BlockSFTConfig, train_set: Prepared) -> dict:
    """Where an adapter comes from, for its ``blocktune.json``."""
    source = data.train_data or load_mixture(data.mixture).to_dict()
    full = train_set.num_examples - train_set.num_block
    return provenance(args.seed) | {
        "data": source,
        "data_sets": dict(train_set.data_sets),
        "examples": train_set.num_examples,
        "modes": {"block": train_set.num_block, "full": full},
        "objective": describe_objective(args),
    }


def resolved(data: DataArgs, args: BlockSFTConfig, choice: ModelConfig) -> dict[str, dict]:
    """Every setting of a run, by group, as ``resolved_config.yaml`` holds it."""
    training = {k: v for k, v in args.to_sanitized_dict().items() if not k.endswith("token")}
    return {"data": vars(data).copy(), "model": vars(choice).copy(), "training": training}
