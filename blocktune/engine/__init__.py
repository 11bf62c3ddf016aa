"""Serving: encode, assemble, prefill, decode, and say what it cost."""

from blocktune.adapter.load import Loaded, load_model
from blocktune.engine.context_cache import CachedContext
from blocktune.engine.engine import EncodeReport, Engine
from blocktune.engine.generation import Answer, Sampling
from blocktune.engine.prompts import Request
from blocktune.engine.usage import Ttft, Usage

__all__ = [
    "Answer",
    "CachedContext",
    "EncodeReport",
    "Engine",
    "Loaded",
    "Request",
    "Sampling",
    "Ttft",
    "Usage",
    "load_model",
]
