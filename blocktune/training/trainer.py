"""TRL's SFTTrainer for layouts: with its own collator and loss, and adapters with a layout."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig
from torch import Tensor
from torch.utils.data import Sampler, SequentialSampler
from transformers import EvalPrediction, PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.trainer_utils import EvalLoopOutput
from trl import SFTTrainer

from blocktune.adapter import AdapterInfo
from blocktune.attention import attach
from blocktune.attention.flex import BLOCK
from blocktune.data.example import RagExample
from blocktune.data.sources.records import LeftOut
from blocktune.links import link_base
from blocktune.models.gate import context_length, require_supported
from blocktune.models.load import load_base, read_tokenizer
from blocktune.provenance import provenance
from blocktune.training.checkpoint import AdapterFiles, StagedSaving, adapter_info, settings
from blocktune.training.collator import Augmentation, BlockDataCollator
from blocktune.training.config import BlockSFTConfig
from blocktune.training.dataset import COLUMNS, Prepared, Sample, in_modes, prepare, to_sample
from blocktune.training.launch_checks import launch_name, refuse_launch, save_whole
from blocktune.training.lora import keeps_base, make_trainable, precision_kept
from blocktune.training.loss import Objective, Sums, evaluating, find_teacher
from blocktune.training.order import EpochCallback, EpochOrder
from blocktune.training.plan import Speedometer, describe_objective, matmul_rate, row_flops, size_of
from blocktune.training.recompute import narrowed

logger = logging.getLogger("blocktune")

Rows = Dataset | Iterable[Mapping[str, Any] | RagExample | Sample]


class BlockSFTTrainer(StagedSaving, SFTTrainer):
    """Trains a model to answer from chunks that do not see each other (or as the layout says).

    It is used like TRL's `SFTTrainer`; `blocktune train` runs it. The loss is the mean over the
    answer tokens of the whole step, for any split over accumulation steps and processes.

    Args:
        model: A folder or repository name (loaded in float32), or a model; bare or PEFT.
        args: The configuration; default: `BlockSFTConfig` with TRL's output folder.
        data_collator: A `BlockDataCollator`; its ``format`` is that of the prompts.
        train_dataset: A Hugging Face `Dataset`, dicts or examples, see `to_sample`.
        eval_dataset: The same, or several by name.
        compute_metrics: As in `SFTTrainer`, like the others; needs a second forward pass.
        peft_config: Adapter to train; None trains the whole model or the adapter it has.

    Attributes:
        prepared: The training set, with the number of dropped examples.
        files: Writes the files of adapters.

    Raises ValueError if the model is not supported, a row cannot be read or is too long, or options
    or the launch are incompatible.
    """

    _tag_names = ["blocktune", "trl", "sft"]  # noqa: RUF012 (TRL's own shape)
    _name = "Block SFT"

    def __init__(
        self,
        model: str | PreTrainedModel,
        args: BlockSFTConfig | None = None,
        data_collator: BlockDataCollator | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | dict[str, Rows] | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        compute_metrics: Callable[[EvalPrediction], dict] | None = None,
        callbacks: Sequence[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        preprocess_logits_for_metrics: Callable[[Tensor, Tensor], Tensor] | None = None,
        peft_config: PeftConfig | None = None,
    ):
        name = model if isinstance(model, str) else model.config._name_or_path
        args = args or BlockSFTConfig(output_dir=f"{name.split('/')[-1]}-BlockSFT")
        if not isinstance(args, BlockSFTConfig):
            raise ValueError(f"args must be a BlockSFTConfig, got {type(args).__name__}")
        if args.push_to_hub:
            raise ValueError("push_to_hub is for `blocktune train`; here use `blocktune push`")
        if train_dataset is None:
            raise ValueError("train_dataset is missing; pass rows with question, chunks, answers")
        if isinstance(model, str):
            model, loaded = load_base(model, dtype="float32", place=False, what="base model")
            processing_class = processing_class or loaded
        tokenizer = processing_class or read_tokenizer(model.config._name_or_path)
        self.args, self.processing_class = args, tokenizer
        rope = require_supported(model)
        self.collator = _checked_collator(data_collator, args, tokenizer, link_base(model))
        config = model.config.get_text_config()
        self.exact_tokens, context = rope.max_tokens, context_length(config)
        self._longest = min(args.max_length or context, rope.max_tokens or context)
        packed = _pack_length(args.pack_length, config)
        self.prepared = self._prepare(train_dataset, args.train_batch_size, packed)
        info = self._describe(model)
        model = make_trainable(model, tokenizer, args, peft_config)
        attach(model, args.attention_execution)
        self.collator = replace(
            self.collator,
            link_base=info.link_base(model, tokenizer),
            num_tokens=link_base(model),  # now including added link tokens
            check_layer=args.sampler and args.sampler.check_layer(config.num_hidden_layers),
        )
        teacher = find_teacher(args, model, tokenizer, args.freeze_base or keeps_base(model))
        self.objective = Objective(args.attention_execution, args, teacher, rope)
        self.order: EpochOrder | None = None
        self._sums = {"train": Sums(), "eval": Sums()}
        with precision_kept(model):
            super().__init__(
                model=model,
                args=args,
                data_collator=self.collator,
                train_dataset=self.prepared.dataset,
                eval_dataset=self._prepare_evaluation(eval_dataset),
                processing_class=tokenizer,
                compute_metrics=compute_metrics,
                callbacks=list(callbacks or ()),
                optimizers=optimizers,
                preprocess_logits_for_metrics=preprocess_logits_for_metrics,
            )
        self._finish(info)

    def _describe(self, model: PreTrainedModel) -> AdapterInfo:
        args, prepared = self.args, self.prepared
        full = prepared.num_examples - prepared.num_block
        if args.scope == "encode" and full:
            raise ValueError(
                f"scope 'encode' trains on rows of chunks, which {full:,} examples in full "
                "attention lack; set block_share: 1.0, or another scope"
            )
        origin = provenance(args.seed) | {
            "data_sets": dict(prepared.data_sets),
            "data_digest": prepared.digest,
            "examples": prepared.num_examples,
            "modes": {"block": prepared.num_block, "full": full},
            "objective": describe_objective(args),
        }
        fields = {"link_mode": args.link_mode, "link_seed": args.seed, "scope": args.scope}
        fields |= {"layout": args.layout, "format": self.collator.format}
        return adapter_info(model, self.processing_class, **fields, training=origin)

    def _finish(self, info: AdapterInfo) -> None:
        """Sets up what needs the Trainer to be initialised: launch checks, speed, files."""
        args, model = self.args, self.model
        # Makes the Trainer count the answer tokens of all accumulation steps and ranks.
        self.model_accepts_loss_kwargs = True
        self._signature_columns = COLUMNS
        refuse_launch(self.accelerator, self.is_deepspeed_enabled)
        save_whole(self.accelerator)
        state_dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else model.dtype
        self.size = size_of(model, state_dtype.itemsize)
        self.speed = Speedometer(
            row_flops(self.size, self.objective.teacher is not None),
            matmul_rate(args.device, state_dtype) * self.accelerator.num_processes,
        )
        self.add_callback(EpochCallback(self))
        self.files = AdapterFiles(info, {"training": settings(args)}, args.freeze_base).described(
            world_size=self.accelerator.num_processes, launch=launch_name(self.accelerator)
        )

    def _prepare(self, rows: Rows, batch: int, pack_length: int | None = None) -> Prepared:
        args = self.args
        if isinstance(rows, str | Mapping):
            got = type(rows).__name__
            raise ValueError(f"data must be rows, got {got}; pass one split (dataset['train'])")
        samples, left_out = [], Counter()
        for index, row in enumerate(rows):
            try:
                sample = to_sample(row, self.processing_class, self.collator.format)
                if sample.example.response is None and not sample.example.answers:
                    raise LeftOut("no answer; to learn from such a row, give it a 'response'")
                samples.append(sample)
            except LeftOut as reason:
                left_out[str(reason)] += 1
            except ValueError as error:
                raise ValueError(f"row {index} of the dataset: {error}") from None
        for reason, count in left_out.items():
            logger.warning("%d rows are left out: %s", count, reason)
        if left_out and not samples:
            reason, _ = left_out.most_common(1)[0]
            raise ValueError(f"no example to train on: all rows are left out: {reason}")
        if not (isinstance(rows, list) and rows and isinstance(rows[0], Sample)):
            samples = in_modes(samples, args.block_share, args.both_modes, args.seed)
        return prepare(
            samples,
            self.collator.reader,
            limit=self._longest,
            drop_long=args.long_examples == "drop",
            pack_length=pack_length,
            position_gap=args.position_jitter,
            multiple_of=batch * args.world_size if args.world_size > 1 else 1,
        )

    def _prepare_evaluation(self, rows: Rows | dict[str, Rows] | None) -> Any:
        if isinstance(rows, dict):
            return {name: self._prepare_evaluation(part) for name, part in rows.items()}
        names = getattr(rows, "column_names", ())
        if rows is None or isinstance(rows, str) or set(names) == set(COLUMNS):
            return rows  # prepared already; a text names one of several
        prepared = self._prepare(rows, self.args.eval_batch_size)
        # So many predictions reach metrics: accelerate drops those of the rows without labels.
        prepared.dataset.total_dataset_length = prepared.num_examples
        return prepared.dataset

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluates as the Trainer does; ``eval_dataset`` may be rows as for the constructor."""
        return super().evaluate(self._prepare_evaluation(eval_dataset), *args, **kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None) -> Any:
        """The loss under each prompt's layout, and optionally the outputs of all rows."""
        bare = self.accelerator.unwrap_model(model)
        if self.collator.check_layer is not None:
            stop = not (self.is_fsdp_enabled or is_deepspeed_zero3_enabled())
            how = self.collator.sampler, self.objective.rope, self.args.attention_execution, stop
            with evaluating(bare):
                inputs = {**inputs, "layout": narrowed(bare, inputs, *how).pack()}
        result = self.objective(model, inputs, bare)
        self._count(result)
        # DDP and DeepSpeed average gradients over ranks; the token count is over all ranks.
        ranks, count = self.accelerator.num_processes, num_items_in_batch
        loss = result.total / result.tokens if count is None else result.total * ranks / count
        if not return_outputs:
            return loss
        with torch.no_grad():
            return loss, model(input_ids=inputs["input_ids"], layout=inputs["layout"])

    def _count(self, result: Sums) -> None:
        """Adds sums over all ranks; means of micro-batches would weight tokens unequally."""
        mode = "train" if self.model.training else "eval"
        own = torch.stack([value.detach().double() for value in result])
        sums = Sums(*self.accelerator.gather(own).view(-1, len(own)).sum(0).tolist())
        self._sums[mode] = Sums(*map(sum, zip(self._sums[mode], sums, strict=True)))
        if not math.isfinite(sums.total) and not self.args.fp16:  # fp16 skips such steps
            raise ValueError(
                f"the {mode} loss after step {self.state.global_step} is {sums.total}; start again "
                "(--overwrite) with a lower learning_rate or another dtype"
            )
        if mode == "train":
            self._total_train_tokens += int(sums.rows)
            self.state.num_input_tokens_seen = self._total_train_tokens  # saved in checkpoints
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds means per answer token, speed without padding, utilisation and time left."""
        mode = "train" if self.model.training else "eval"
        means = self._sums[mode].means(has_teacher=self.objective.teacher is not None)
        self._sums[mode] = Sums()
        logs |= {f"eval_{name}" if mode == "eval" else name: mean for name, mean in means.items()}
        if "loss" in logs:
            step, last = self.state.global_step, self.state.max_steps
            logs |= self.speed.read(self._total_train_tokens, step, last)
        super().log(logs, start_time)

    def evaluation_loop(
        self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """Evaluates as the Trainer does, but with the mean loss over all answer tokens."""
        self._sums["eval"] = Sums()
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        sums = self._sums["eval"]
        output.metrics[f"{metric_key_prefix}_loss"] = sums.total / max(sums.tokens, 1)
        return output

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        args = self.args
        if args.train_sampling_strategy == "sequential":
            return super()._get_train_sampler(train_dataset)
        rows = self.train_dataset if train_dataset is None else train_dataset
        step = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        self.order = EpochOrder(
            rows["length"],
            rows["answer_length"].count(0),
            step if args.train_sampling_strategy == "group_by_length" else None,
            args.seed if args.data_seed is None else args.data_seed,
        )
        return self.order

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler:
        return SequentialSampler(eval_dataset)  # predictions in the order of the rows, blanks last

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Batches for evaluation: without augmentation, and the same in every epoch."""
        train_collator = self.data_collator
        self.data_collator = replace(self.collator, augmentation=Augmentation(), epoch=0)
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self.data_collator = train_collator

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """Batches for `predict`, as for evaluation; ``test_dataset`` may be rows."""
        return self.get_eval_dataloader(self._prepare_evaluation(test_dataset))

    def _send_telemetry(self) -> None:
        """Sends nothing."""


def _pack_length(length: int | None, config: Any) -> int | None:
    """As asked for, but Llama 4 scales queries by their index in a row, beyond some length."""
    scales = getattr(config, "attn_temperature_tuning", False)
    return min(length, config.floor_scale - 1) if length and scales else length


def _checked_collator(
    collator: Any, args: BlockSFTConfig, tokenizer: PreTrainedTokenizerBase, num_tokens: int
) -> BlockDataCollator:
    plain = BlockDataCollator(tokenizer)
    collator = plain if collator is None else collator
    if not isinstance(collator, BlockDataCollator):
        name = type(collator).__name__
        raise ValueError(f"data_collator must be a BlockDataCollator, got {name}")
    names = ("layout", "augmentation", "sampler", "has_teacher", "seed", "max_length")
    own = {name: getattr(args, name) for name in names}
    for name, value in own.items():
        if getattr(collator, name) not in (value, getattr(plain, name)):
            raise ValueError(
                f"data_collator has {name} {getattr(collator, name)}, but the configuration has "
                f"{value}; set it in the configuration"
            )
    own["max_length"] = None  # the trainer drops or refuses longer rows before
    if args.attention_execution == "flex":
        own["row_multiple"] = BLOCK
    return replace(collator, num_tokens=num_tokens, **own)
