"""Quantised bases: 4-bit and 8-bit weights by bitsandbytes, on CUDA and CPUs."""

from __future__ import annotations

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import is_accelerate_available, is_bitsandbytes_available

from blocktune.registry import require_one_of

QUANTIZATIONS = ("nf4", "nf4-double", "fp4", "fp4-double", "int8")
"""Formats that a base can be loaded in; ``double`` quantises the scales of 4-bit weights too."""


def quantization_config(name: str, dtype: torch.dtype) -> BitsAndBytesConfig:
    """The configuration by which transformers quantises a base, with products in ``dtype``.

    Raises ValueError if the name is not in `QUANTIZATIONS`, or bitsandbytes is missing. Source:
    QLoRA, arXiv:2305.14314; LLM.int8(), arXiv:2208.07339.
    """
    require_one_of("quantize", name, QUANTIZATIONS)
    if not (is_bitsandbytes_available() and is_accelerate_available()):
        raise ValueError(
            f"'{name}' needs bitsandbytes and accelerate; run pip install 'blocktune[gpu]'"
        )
    if name == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    kind, _, double = name.partition("-")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=bool(double),
        bnb_4bit_compute_dtype=dtype,
    )


def quantization_of(model: PreTrainedModel) -> str | None:
    """How a loaded model is quantised: one of `QUANTIZATIONS`, another library's name, or None."""
    config = getattr(model.config, "quantization_config", None)
    if config is None:
        return None
    values = config if isinstance(config, dict) else config.to_dict()
    if values.get("load_in_4bit"):
        double = "-double" if values["bnb_4bit_use_double_quant"] else ""
        return values["bnb_4bit_quant_type"] + double
    if values.get("load_in_8bit"):
        return "int8"
    return str(values["quant_method"])


def keep_stored_codes(model: nn.Module) -> None:
    """Stops bitsandbytes 0.50 from rewriting 4-bit weights on CPUs: less exact, no gradients."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
