"""Serving: encode, assemble, prefill, decode, and say what it cost."""

from blocktune.engine.account import Account, Ttft
from blocktune.engine.decode import Sampling
from blocktune.engine.engine import EncodeReport, Engine
from blocktune.engine.load import Loaded, load_model
from blocktune.engine.prompts import Request
from blocktune.engine.run import Answer

__all__ = [
    "Account",
    "Answer",
    "EncodeReport",
    "Engine",
    "Loaded",
    "Request",
    "Sampling",
    "Ttft",
    "load_model",
]
