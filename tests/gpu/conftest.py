"""Sizes of the GPU tests: Llama 3.1 8B cut to two layers, or tiny ones on a CPU."""

from dataclasses import replace

import pytest
from shape import LLAMA_8B, TINY, Shape


@pytest.fixture(scope="session")
def shape(request) -> Shape:
    if request.config.getoption("--gpu-tests-on") == "cpu":
        return TINY
    return replace(LLAMA_8B, layers=2, tokens=4096)
