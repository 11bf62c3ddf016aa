"""Prepares a base for training: PEFT, learned tokens, frozen weights, and a faster LoRA layer."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import LoraConfig, PeftConfig, get_peft_model, prepare_model_for_kbit_training
from peft.tuners.lora.layer import Linear
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, set_seed

from blocktune.adapter import scope_adapter
from blocktune.adapter.load import require_kind
from blocktune.adapter.scope import INITS
from blocktune.links import add_link_tokens, install_links, installed_links, links_to_train
from blocktune.models.identity import base_fingerprint, same_base, saved_fingerprint
from blocktune.models.load import read_config
from blocktune.models.quantize import quantization_of
from blocktune.training.config import BlockSFTConfig

logger = logging.getLogger("blocktune")


def make_trainable(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    args: BlockSFTConfig,
    peft_config: PeftConfig | None,
) -> PreTrainedModel:
    """Adds learned tokens and an adapter to a base, and freezes the rest.

    A PEFT model keeps its adapter, and a link table its rows. Raises ValueError if nothing would be
    trained, or settings are incompatible.
    """
    learned, added = args.layout.num_learned, range(0)
    is_wrapped = hasattr(model, "peft_config")
    if is_wrapped + args.freeze_base + (peft_config is not None) > 1:
        raise ValueError(
            "only one of peft_config (use_peft), freeze_base and a model that has an adapter "
            "already can be trained; load the model again, or leave the others out"
        )
    if is_wrapped or args.freeze_base or peft_config is not None:
        require_named_base(model)
    if learned and args.link_mode == "added_tokens":
        if is_wrapped:
            raise ValueError("link_mode 'added_tokens' needs the bare model; pass peft_config too")
        added = add_link_tokens(model, tokenizer, learned, args.seed)
    has_table = learned and args.link_mode == "table"
    table = links_to_train(model, learned, args.seed) if has_table else None
    if args.freeze_base:
        model.requires_grad_(False)
    elif peft_config is not None:
        model = _wrap(model, args, copy.deepcopy(peft_config), added)
    require_reproducible(model)
    scope_adapter(model, args.scope)
    if table is not None:
        if installed_links(model) is None:
            install_links(model, table)
        table.requires_grad_(True)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing to train; set use_peft: true, or links with freeze_base")
    return model


def _wrap(model, args: BlockSFTConfig, peft_config: PeftConfig, added: range) -> PreTrainedModel:
    if getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    require_kind(peft_config)
    if added:
        _train_rows(peft_config, model, added)
    # Routers of Llama 4 and Phi MoE are linear layers that return more than a product.
    linear = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    routers = [name for name, m in linear if type(m).__name__.endswith("Router")]
    if routers and getattr(peft_config, "target_modules", None) == "all-linear":
        peft_config.exclude_modules = [*(peft_config.exclude_modules or ()), *routers]
    if isinstance(peft_config, LoraConfig) and quantization_of(model) is None:
        peft_config._register_custom_module({nn.Linear: AddedLora})
    set_seed(args.seed)  # for LoRA's random A matrices; the Trainer sets its seed later
    try:
        wrapped = get_peft_model(model, peft_config)
    except (TypeError, KeyError, AttributeError) as error:  # parts that exclude each other
        raise ValueError(f"PEFT cannot make this adapter for the model: {error!r}") from None
    _warn_of_names(peft_config, wrapped)  # PEFT has renamed those of fused experts
    return wrapped


def _warn_of_names(config: PeftConfig, model: PreTrainedModel) -> None:
    """Warns of names in a list of modules that no module has, since PEFT ignores them."""
    modules = [f".{name}" for name, _ in model.named_modules()]
    for option in ("target_modules", "modules_to_save"):
        names = getattr(config, option, None)
        for name in () if isinstance(names, str | None) else names:
            if not any(module.endswith(f".{name}") for module in modules):
                logger.warning("%s: the model has no module '%s', so it is ignored", option, name)


def _train_rows(config: PeftConfig, model: PreTrainedModel, added: range) -> None:
    """Trains the embeddings of added tokens, and the tokens that are trained already."""
    if not hasattr(config, "trainable_token_indices"):
        kind = config.peft_type.value
        raise ValueError(f"{kind} cannot train the tokens of link_mode 'added_tokens'; use a table")
    name = next(n for n, m in model.named_modules() if m is model.get_input_embeddings())
    name, given = name.split(".")[-1], config.trainable_token_indices or []
    given = given if isinstance(given, dict) else {name: given}
    config.trainable_token_indices = given | {name: [*given.get(name, ()), *added]}


def keeps_base(model: nn.Module) -> bool:
    """Whether a model has an adapter, and is its base while the adapter is off."""
    configs = getattr(model, "peft_config", {}).values()
    inits = [getattr(config, "init_lora_weights", True) for config in configs]
    biases = {getattr(config, "bias", "none") for config in configs}
    return biases == {"none"} and all(init in INITS for init in inits)


def require_reproducible(model: nn.Module) -> None:
    """Raises ValueError if a model's adapter would be served otherwise than it is trained."""
    if hasattr(model, "peft_config") and not hasattr(model, "disable_adapter"):
        raise ValueError("pass get_peft_model's result, not a model after model.add_adapter")
    if len(names := trained_adapters(model)) > 1:
        raise ValueError(f"several adapters are active ({', '.join(names)}); set_adapter(one)")
    for config in (model.peft_config[name] for name in names):
        require_kind(config)
        if "niter" in str(init := getattr(config, "init_lora_weights", True)):
            raise ValueError(f"init_lora_weights '{init}' changes the base at random; use 'pissa'")


def require_named_base(model: PreTrainedModel) -> str:
    """The fingerprint of the base by which an adapter of this model will be loaded.

    Raises ValueError if the base was resized or changed after loading: its adapter would fit none.
    """
    name, rows, saved = model.config._name_or_path, model.config.get_text_config().vocab_size, None
    revision, count = getattr(model.config, "_commit_hash", None), rows
    with suppress(ValueError, OSError):  # a base without files
        found = read_config(name, revision)
        count = found.get_text_config().vocab_size
        cached = {"revision": revision, "local_files_only": True}
        folder = name if Path(name).is_dir() else snapshot_download(name, **cached)
        saved = saved_fingerprint(folder, found)
    fix = "so its adapter would fit no base; save this model and tokenizer and train on that folder"
    if count != rows:
        raise ValueError(f"the model embeds {rows:,} tokens, but '{name}' {count:,}, {fix}")
    own = base_fingerprint(model)
    if saved is None or same_base(saved, own) or model.dtype == torch.float16:  # rounded
        return own
    if not hasattr(model, "peft_config") or keeps_base(model):
        raise ValueError(f"the model has other weights than '{name}' (such as a merge), {fix}")
    return saved  # PEFT changed the base, as it will when the adapter is loaded


def trained_adapters(model: nn.Module) -> list[str]:
    """Names of the active adapters of a PEFT model; [] for a bare one."""
    return list(model.active_adapters) if hasattr(model, "peft_config") else []


class AddedLora(Linear):
    """PEFT's LoRA layer with the same results and less memory traffic.

    PEFT scales and adds the product: two more tensors as large as the output, and their gradients.
    Here a plain adapter adds to the output in place. All else is left to PEFT.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``x W^T + scale (x A^T) B^T`` for ``x`` ``(..., in)``; returns ``(..., out)``."""
        name = self.active_adapters[0] if len(self.active_adapters) == 1 else None
        if args or kwargs or not self._is_plain(name, x):
            return super().forward(x, *args, **kwargs)
        rows = x.flatten(0, -2)
        out = self.base_layer(rows)
        weight = self.lora_B[name].weight
        out.addmm_(self.lora_A[name](rows), weight.t(), alpha=self.scaling[name])
        return out.unflatten(0, x.shape[:-1])

    def _is_plain(self, name: str | None, x: Tensor) -> bool:
        """Whether an adapter is on, and is plain LoRA in one precision with unsharded weights."""
        off = self.disable_adapters or self.merged or x.ndim < 2
        if off or name not in self.lora_A or name in self.lora_variant:
            return False
        second = self.lora_B[name]
        weight = second.weight  # if it is sharded, it cannot be read from outside its module
        return (
            isinstance(self.lora_dropout[name], nn.Identity)
            and second.bias is None
            and x.dtype == self.base_layer.weight.dtype == weight.dtype
            and not torch.is_autocast_enabled(x.device.type)
            and tuple(weight.shape) == (second.out_features, second.in_features)
            and not hasattr(weight, "placements")
        )


@contextmanager
def precision_kept(model: nn.Module) -> Iterator[None]:
    """Restores values and dtype of trainable weights after the block, on their current device.

    With a quantised base, TRL rounds them to bfloat16, which would lose updates below 1/256 of a
    weight. QLoRA (arXiv:2305.14314) needs only the products in bfloat16.
    """
    kept = [(weight, weight.data) for weight in model.parameters() if weight.requires_grad]
    yield
    for weight, data in kept:
        if weight.dtype != data.dtype:
            weight.data = data.to(weight.device)
