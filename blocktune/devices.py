"""Names of devices, checked before a model is loaded onto one."""

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
