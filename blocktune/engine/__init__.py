"""Serving: encode, assemble, prefill, decode, and say what it cost."""

from blocktune.engine.account import Account, Ttft
from blocktune.engine.decode import Sampling
from blocktune.engine.engine import Answer, EncodeReport, Engine
from blocktune.engine.load import Loaded, load_model

__all__ = [
    "Account",
    "Answer",
    "EncodeReport",
    "Engine",
    "Loaded",
    "Sampling",
    "Ttft",
    "load_model",
]
