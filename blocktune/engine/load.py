"""Loading a base model, its tokenizer and an adapter, with errors a person can act on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.tokenization_utils_base import PreTrainedTokenizerBase

from blocktune.adapter import AdapterInfo, adapter_folder, load_adapter


class Loaded(NamedTuple):
    """A model ready to serve; ``info`` and ``folder`` are None without an adapter."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    info: AdapterInfo | None
    folder: Path | None


def load_model(
    model: str,
    adapter: str | Path | None = None,
    *,
    dtype: str = "auto",
    device: str | None = None,
    revision: str | None = None,
) -> Loaded:
    """Loads a causal language model, and puts an adapter on it.

    LoRA weights are merged where the base is not quantised: serving then costs what the base
    costs.

    Args:
        model: Folder or repository name on the HF Hub.
        adapter: Folder or repository name, or None.
        dtype: ``auto`` (as saved), ``float32``, ``bfloat16`` or ``float16``.
        device: Default: CUDA if there is one, else the CPU.
        revision: Of the model's repository.

    Raises:
        ValueError: If there is no such model or adapter, or they do not fit each other.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, revision=revision)
        base = AutoModelForCausalLM.from_pretrained(
            model, revision=revision, dtype=dtype, attn_implementation="sdpa"
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot load a language model from '{model}': {reason}; give a folder saved by "
            "save_pretrained or a repository name on the Hugging Face Hub"
        ) from None
    base = base.to(device)
    if adapter is None:
        return Loaded(base.eval(), tokenizer, None, None)
    folder = adapter_folder(adapter)
    quantised = getattr(base, "is_quantized", False)
    tuned, info = load_adapter(base, tokenizer, folder, merge=not quantised)
    return Loaded(tuned.eval(), tokenizer, info, folder)
