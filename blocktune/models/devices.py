"""Devices and number types that a model can be loaded with."""

from __future__ import annotations

import torch


def check_device(name: str) -> None:
    """Raises ValueError for what names no device, or one that this machine does not have."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device '{name}'; wanted cuda, cuda:0, cpu or the like") from None
    there = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= there:
        raise ValueError(
            f"no device '{name}' here: torch {torch.__version__} finds {there} CUDA device(s); "
            "take cpu, or leave the device out"
        )


DTYPES = ("auto", "float32", "bfloat16", "float16")


def check_dtype(name: str) -> None:
    """Raises ValueError for a name that is none of `DTYPES`."""
    if name not in DTYPES:
        raise ValueError(f"unknown dtype '{name}'; available: {', '.join(DTYPES)}")
