"""Loads base models and adapters by name, and applies adapters to their bases."""

from __future__ import annotations

import copy
import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.adapter.info import INFO_FILE, OWN_WEIGHTS, AdapterInfo, Release, find_release
from blocktune.adapter.scope import require_mergeable, scope_adapter
from blocktune.links import add_link_tokens, install_links, load_links
from blocktune.models.identity import base_fingerprint, same_base, tokenizer_hash
from blocktune.models.load import adapter_folder, load_base, read_config, require_readable, sharing
from blocktune.models.probe import Refused

if TYPE_CHECKING:
    from peft import PeftModel

PEFT_FILE = "adapter_config.json"
OWN_BASE = "the base of adapter '{}' (--model takes another copy)"  # for errors
logger = logging.getLogger("blocktune")


def load_adapter(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapter: str | Path,
    revision: str | None = None,
    merge: bool = False,
    links: bool = True,
) -> tuple[PreTrainedModel, AdapterInfo]:
    """Applies an adapter, a folder or a repository of the Hub, to a bare base model.

    PEFT wraps the base in place, or LoRA weights are added to it (``merge``, if they can be). The
    adapter's link tokens are added to the tokenizer, and its link table is installed (``links``).

    Raises ValueError if there is no such adapter, it is damaged, it was made for another base or
    tokenizer, or its scope cannot be merged.
    """
    folder = adapter_folder(adapter, revision)
    info = AdapterInfo.load(folder)
    require_whole(folder)
    if merge:
        require_mergeable(info.scope)
    _check_base(info, model, tokenizer, adapter)
    table = load_links(folder) if links and info.has_table else None
    if info.adds_tokens:
        add_link_tokens(model, tokenizer, info.num_learned, info.link_seed)
    if (folder / PEFT_FILE).is_file():
        model = _with_peft(model, folder, merge)
    scope_adapter(model, info.scope)
    if table is not None:
        install_links(model, table.to(model.dtype))
    return model.eval(), info


def _with_peft(model: PreTrainedModel, folder: Path, merge: bool) -> PreTrainedModel:
    from peft import PeftConfig, PeftModel  # imported here, since only adapters need PEFT

    hook = model.register_load_state_dict_post_hook(_refuse_unused)
    try:
        require_kind(PeftConfig.from_pretrained(folder))
        with warnings.catch_warnings():  # missing weights would be random
            warnings.filterwarnings("error", message="Found missing adapter keys")
            wrapped = PeftModel.from_pretrained(model, folder)
        if merge and (part := unmergeable(wrapped)):
            logger.warning("'%s' is served without merging it: %s", folder, part)
        return _merged(wrapped) if merge and not part else wrapped
    except (Refused, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # of any type, since the files may be arbitrary
        reason = " ".join(f"{type(error).__name__} {error}".split())
        raise ValueError(f"PEFT cannot load '{folder}' ({PEFT_FILE}): {reason}") from None
    finally:
        hook.remove()


def _refuse_unused(model: nn.Module, keys: Any) -> None:
    if unused := sorted(keys.unexpected_keys):
        raise ValueError(f"no module takes {len(unused)} of its weights, such as {unused[0]}")


def require_kind(config: Any) -> None:
    """Raises `Refused` if an adapter of a PEFT configuration acts on a prompt as a whole."""
    options = ("alora_invocation_tokens", "layer_replication")
    wrong = [name for name in options if getattr(config, name, None)]
    if config.is_prompt_learning or config.is_adaption_prompt:
        wrong = [f"a {config.peft_type.value} adapter"]
    if wrong:
        raise Refused(f"{wrong[0]} acts on whole prompts, not on chunks; train LoRA without it")


def unmergeable(model: nn.Module) -> str | None:
    """The part of a PEFT model that PEFT applies, but cannot merge; None if it can merge all."""
    from peft.tuners.lora import LoraLayer
    from peft.utils.other import TrainableTokensWrapper

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            name = name.removeprefix("base_model.model.")
            if any(module.lora_bias.values()) and module.get_base_layer().bias is None:
                return f"lora_bias adds a bias to '{name}', which has none"
            if isinstance(module.base_layer, TrainableTokensWrapper):
                return f"'{name}' has LoRA and trained tokens, by a tied embedding"
    return None


def _merged(model: PeftModel) -> PreTrainedModel:
    """Merges an adapter; if it changes one of two tied embeddings, the head gets own weights."""
    from peft.tuners.lora import LoraLayer
    from peft.utils import ModulesToSaveWrapper

    base = model.get_base_model()
    config, head = base.config, base.get_output_embeddings()
    ends = (base.get_input_embeddings(), head)
    adapted = any(isinstance(end, LoraLayer | ModulesToSaveWrapper) for end in ends)
    if all(isinstance(end, ModulesToSaveWrapper) for end in ends):  # unless they are saved as one
        adapted = ends[0].weight is not ends[1].weight
    if adapted and config.get_text_config().tie_word_embeddings:
        own = getattr(head, "base_layer", getattr(head, "original_module", head))
        own.weight = nn.Parameter(own.weight.detach().clone())
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
        base.all_tied_weights_keys = {}
    return model.merge_and_unload()


def require_whole(folder: str | Path) -> None:
    """Raises ValueError if a weight file is missing or truncated; reads only headers."""
    folder, info = Path(folder), AdapterInfo.load(folder)
    has_peft = (folder / PEFT_FILE).is_file()
    # adapters of older versions may have their LoRA in a subfolder, where PEFT puts a named one
    whole = info.has_table and not any(folder.glob(f"*/{PEFT_FILE}"))
    bare = info.base_model == OWN_WEIGHTS or whole
    if has_peft != any(folder.glob("adapter_model*")) or not (has_peft or bare):
        raise ValueError(f"'{folder}' lacks one of {PEFT_FILE} and adapter_model.safetensors")
    require_readable(folder)


def attach_links(
    model: PreTrainedModel, adapter: str | Path, revision: str | None = None
) -> AdapterInfo:
    """Installs link tokens and scope on a model that stock PEFT has loaded.

    ```python
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    info = attach_links(model, folder)
    engine = Engine(model, tokenizer, adapter=info, adapter_folder=folder)
    ```

    The model may be merged only if the adapter's scope is ``both``.

    Raises ValueError if there is no such adapter, or its table or scope does not fit the model.
    """
    folder = adapter_folder(adapter, revision)
    info = AdapterInfo.load(folder)
    for config in getattr(model, "peft_config", {}).values():
        require_kind(config)
    if info.has_table:
        install_links(model, load_links(folder).to(model.dtype))
    scope_adapter(model, info.scope)
    return info


def _check_base(info: AdapterInfo, model, tokenizer, adapter) -> None:
    name, own = model.config._name_or_path or type(model).__name__, base_fingerprint(model)
    if not same_base(info.base_fingerprint, own):
        fix = f"load '{info.base_model}', or train an adapter for '{name}'"
        if info.base_model == OWN_WEIGHTS:
            fix = "leave out the base"
        elif name == info.base_model:
            fix = "its weights have changed, or are of another revision; train the adapter again"
        raise ValueError(
            f"adapter '{adapter}' was made for base '{info.base_model}' "
            f"({info.base_fingerprint}), got '{name}' ({own}); {fix}"
        )
    if info.tokenizer_hash != tokenizer_hash(tokenizer):
        raise ValueError(
            f"adapter '{adapter}' was trained with the tokenizer and chat template of "
            f"'{info.base_model}', got another one from '{tokenizer.name_or_path}'"
        )


def quantize_as_trained(info: AdapterInfo, model: str | None = None) -> str | None:
    """How to quantise the base (None: the adapter's own) on loading; None if it is saved so."""
    name, revision = (model, None) if model else (info.base_model, info.base_revision)
    saved = info.quantization and getattr(read_config(name, revision), "quantization_config", None)
    return None if saved else info.quantization


class Loaded(NamedTuple):
    """A model ready to serve; ``info`` and ``folder`` are None without an adapter."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: AdapterInfo | None
    folder: Path | None


def load_model(
    model: str | None = None,
    adapter: str | Path | None = None,
    *,
    merge: bool = True,
    recurrent: bool = True,
    **options: Any,
) -> Loaded:
    """Loads a causal language model with an adapter.

    LoRA weights are merged, except into a quantised base or with a scope (`AdapterInfo.scope`).

    Args:
        model: Folder or repository of the Hub, optionally with ``@REVISION``; None: the adapter's
            own base and revision. A folder that is an adapter is used as ``adapter``.
        adapter: The same, or ``release:NAME`` for one of `blocktune.adapter.RELEASES`, or None.
        merge: Whether to merge LoRA weights; False: PEFT applies them.
        recurrent: Whether models with recurrent layers are allowed.
        options: dtype, device, revision and quantize, see `blocktune.models.load.load_base`.

    Raises ValueError if model or adapter cannot be found, or do not fit each other.
    """
    return load_models(model, [adapter], merge, recurrent, **options)[0]


def load_models(
    model: str | None,
    adapters: Sequence[str | Path | None],
    merge: bool = True,
    recurrent: bool = True,
    **options: Any,
) -> list[Loaded]:
    """Loads a model with each of several adapters (None: the bare model); see `load_model`.

    An adapter that has a base to itself is merged into it; PEFT applies those that share one.
    """
    sources = [_source(model, adapter, options.get("revision")) for adapter in adapters]
    users = Counter((source.base, source.revision) for source in sources)
    bases, loaded = {}, []
    for source in sources:
        place = source.base, source.revision
        if place not in bases:
            how = options | {"revision": source.revision, "what": source.what}
            bases[place] = load_base(source.base, **how, recurrent=recurrent)
        loaded.append(_apply(source, *bases[place], users[place] == 1, merge))
    return loaded


class _Source(NamedTuple):
    """A base, and the release or adapter to apply to it."""

    base: str
    revision: str | None
    what: str  # the base, for errors
    release: Release | None
    folder: Path | None
    info: AdapterInfo | None


def _source(model: str | None, adapter: str | Path | None, revision: str | None) -> _Source:
    if model is not None and adapter is None and (Path(model) / INFO_FILE).is_file():
        model, adapter = None, model
    release = None if adapter is None else find_release(str(adapter))
    folder = None if adapter is None or release else adapter_folder(adapter)
    info = None if folder is None else AdapterInfo.load(folder)
    what = "a language model" if model or release else OWN_BASE.format(adapter)
    if model is None and release is not None:
        model = release.repository
    elif model is None and info is None:
        raise ValueError("no model is named; give a model, or an adapter to run on its own base")
    elif model is None:
        own = info.base_model == OWN_WEIGHTS
        model, revision = (str(folder), None) if own else (info.base_model, info.base_revision)
    return _Source(model, revision, what, release, folder, info)


def _apply(source: _Source, base, tokenizer, alone: bool, merge: bool) -> Loaded:
    if not alone:
        adds_tokens = source.info is not None and source.info.adds_tokens
        base, tokenizer = sharing(base, own_embeddings=adds_tokens), copy.deepcopy(tokenizer)
    if source.folder is None:
        info = None if source.release is None else source.release.fit(base, tokenizer)
        return Loaded(base, tokenizer, info, None)
    tokenizer = source.info.tokenizer(source.folder, tokenizer)
    plain = source.info.scope == "both" and not getattr(base, "is_quantized", False)
    merge = merge and alone and plain
    adapted, info = load_adapter(base, tokenizer, source.folder, merge=merge)
    return Loaded(adapted, tokenizer, info, source.folder)
