"""Loading a base model, its tokenizer and an adapter, with errors a person can act on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blocktune.adapter import OWN_WEIGHTS, AdapterInfo, find_release, load_adapter
from blocktune.devices import check_device
from blocktune.dtypes import check_dtype
from blocktune.fetch import adapter_folder, pinned
from blocktune.quantize import keep_stored_codes, quantization_config


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
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    quantize: str | None = None,
) -> Loaded:
    """Loads a causal language model, and puts an adapter on it.

    LoRA weights are merged where the base is not quantised: serving then costs what the base
    costs.

    Args:
        model: Folder or repository name on the HF Hub, with ``@REVISION`` if one is wanted; None:
            the adapter's own base, at the revision it was trained on.
        adapter: Folder or repository name, with ``@REVISION`` if one is wanted, or
            ``release:NAME`` for one of `blocktune.adapter.RELEASES`, or None.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        device: Default: CUDA if there is one, else the CPU.
        revision: Of the model's repository.
        quantize: One of `blocktune.quantize.QUANTIZATIONS`, or None: as saved.

    Raises:
        ValueError: If there is no such model or adapter, or they do not fit each other.
    """
    release = None if adapter is None else find_release(str(adapter))
    if release is not None:
        model = model or release.repository
        base, tokenizer = load_base(
            model, dtype=dtype, device=device, revision=revision, quantize=quantize
        )
        return Loaded(base, tokenizer, release.fit(base, tokenizer), None)
    folder = None if adapter is None else adapter_folder(adapter)
    info = None if folder is None else AdapterInfo.load(folder)
    if model is None:
        model, revision = _base_of(info, folder)
    base, tokenizer = load_base(
        model, dtype=dtype, device=device, revision=revision, quantize=quantize
    )
    if folder is None:
        return Loaded(base, tokenizer, None, None)
    quantised = getattr(base, "is_quantized", False)
    tuned, info = load_adapter(base, tokenizer, folder, merge=not quantised)
    return Loaded(tuned.eval(), tokenizer, info, folder)


def load_base(
    model: str,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
    quantize: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model without any adapter, and its tokenizer; see `load_model`.

    Raises:
        ValueError: If there is no such model, or it is quantised already and not as asked.
    """
    name, revision = pinned(model, revision)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    check_device(device)
    check_dtype(dtype)
    with _explained(name):
        config = AutoConfig.from_pretrained(name, revision=revision)
        tokenizer = AutoTokenizer.from_pretrained(name, revision=revision)
    kwargs = _placement(config, dtype, device, quantize)
    with _explained(name):
        base = AutoModelForCausalLM.from_pretrained(name, revision=revision, dtype=dtype, **kwargs)
    keep_stored_codes(base)
    return (base if kwargs else base.to(device)).eval(), tokenizer


@contextmanager
def _explained(name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot load a language model from '{name}': {reason}; give a folder saved by "
            "save_pretrained or a repository name on the Hugging Face Hub"
        ) from None


def _placement(config, dtype: str, device: str, quantize: str | None) -> dict[str, Any]:
    """What a quantised model is loaded with: it must be made on its device, not moved there."""
    saved = getattr(config, "quantization_config", None)
    if saved is None and quantize is None:
        return {}
    if saved is not None and quantize is not None:
        raise ValueError(
            f"the model is saved quantised ({saved.get('quant_method')}) and cannot be made "
            f"'{quantize}' as well; leave quantize out, or name the plain model"
        )
    kwargs: dict[str, Any] = {"device_map": {"": device}}
    if quantize is not None:
        named = (config.dtype or torch.float32) if dtype == "auto" else getattr(torch, dtype)
        kwargs["quantization_config"] = quantization_config(quantize, named)
    return kwargs


def _base_of(info: AdapterInfo | None, folder: Path | None) -> tuple[str, str | None]:
    if info is None:
        raise ValueError("no model is named; give --model, or --adapter to run on its own base")
    if info.base_model == OWN_WEIGHTS:
        return str(folder), None
    return info.base_model, info.base_revision
