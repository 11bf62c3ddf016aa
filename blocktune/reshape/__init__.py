"""How later rows see reused keys: one reshape a file, scores in, scores out."""

from blocktune.reshape.base import Reshape, Seen
from blocktune.reshape.registry import RESHAPES
from blocktune.reshape.running import Reshaping
from blocktune.reshape.scaled_context import ScaledContext
from blocktune.reshape.top_chunks import TopChunks

__all__ = ["RESHAPES", "Reshape", "Reshaping", "ScaledContext", "Seen", "TopChunks"]
