"""A base model made ready to train: links, PEFT, what is frozen, and whose base it is."""

from __future__ import annotations

from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed
from trl import ModelConfig, get_peft_config, get_quantization_config

from blocktune.adapter import AdapterInfo
from blocktune.links import add_link_tokens, install_links, new_links
from blocktune.models import load
from blocktune.models.identity import base_fingerprint, tokenizer_hash
from blocktune.models.quantize import quantization_of
from blocktune.prompt import PromptFormat
from blocktune.training.config import BlockSFTConfig
from blocktune.training.lora import add_in_product


class Ready(NamedTuple):
    """What the trainer starts from."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: AdapterInfo


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
            f"attn_implementation '{choice.attn_implementation}' knows no chunks; leave it out and "
            "choose attention_execution: split, flex or dense"
        )
    quantised = choice.load_in_4bit or choice.load_in_8bit
    if quantised and choice.dtype in (None, "auto"):
        raise ValueError(
            "a quantised base is computed in a dtype that must be named; set dtype: bfloat16 "
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


def make_ready(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: BlockSFTConfig,
    choice: ModelConfig,
    fmt: PromptFormat,
    training: dict[str, Any],
) -> Ready:
    """Wraps a bare base for training: link tokens or table, PEFT, frozen parts.

    Args:
        model: The bare base.
        tokenizer: Its own; gets link tokens where they are added.
        args: Layout, links, seed, what is frozen.
        choice: Name of the base and settings of LoRA.
        fmt: The wording, for the adapter's info.
        training: Provenance, for the adapter's info.

    Raises:
        ValueError: If nothing would be trained.
    """
    info = _info(model, tokenizer, args, choice, fmt, training)
    learned, added = info.num_learned, range(0)
    if learned and args.link_mode == "added_tokens":
        added = add_link_tokens(model, tokenizer, learned, args.seed)
    table = new_links(model, learned, args.seed) if info.has_table else None
    model = _wrap(model, args, choice, added)
    if table is not None:
        install_links(model, table)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing to train; set use_peft: true, or links with freeze_base")
    return Ready(model, tokenizer, info)


def _info(model, tokenizer, args, choice, fmt, training) -> AdapterInfo:
    asked = choice.model_revision if choice.model_revision != "main" else None
    config = model.config.get_text_config()
    return AdapterInfo(
        base_model=choice.model_name_or_path,
        base_revision=getattr(model.config, "_commit_hash", None) or asked,
        quantization=quantization_of(model),
        rope=dict(config.rope_parameters or {}),
        base_fingerprint=base_fingerprint(model),
        tokenizer_hash=tokenizer_hash(tokenizer),
        layout=args.layout,
        format=fmt,
        link_mode=args.link_mode,
        link_seed=args.seed,
        training=training,
    )


def _wrap(model, args: BlockSFTConfig, choice: ModelConfig, added: range) -> PreTrainedModel:
    if args.freeze_base and choice.use_peft:
        raise ValueError("freeze_base trains the link table alone; drop it or use_peft")
    if args.freeze_base:
        return model.requires_grad_(False)
    peft_config = get_peft_config(choice)
    if peft_config is None:
        return model
    from peft import get_peft_model, prepare_model_for_kbit_training

    if choice.load_in_4bit or choice.load_in_8bit:
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    if added:
        name = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
        peft_config.trainable_token_indices = {name.split(".")[-1]: list(added)}
    add_in_product(peft_config, model)
    set_seed(args.seed)  # LoRA's random half; the Trainer seeds after this
    return get_peft_model(model, peft_config)
