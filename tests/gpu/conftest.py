"""Sizes of the GPU tests: Llama 3.1 8B cut to two layers, or tiny ones on a CPU."""

from dataclasses import replace

import pytest
import torch
from shape import LLAMA_8B, TINY, Shape


@pytest.fixture(scope="session")
def device(request) -> str:
    """Without a GPU the same code runs on the CPU, so that it cannot rot."""
    there = "cuda" if torch.cuda.is_available() else "cpu"
    return request.config.getoption("--gpu-tests-on") or there


@pytest.fixture(scope="session")
def shape(device) -> Shape:
    return TINY if device == "cpu" else replace(LLAMA_8B, layers=2, tokens=4096)
