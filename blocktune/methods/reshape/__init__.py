"""How later rows see reused keys: one reshape a file, scores in, scores out."""

from blocktune.methods.registry import RESHAPES
from blocktune.methods.reshape.base import Reshape, Seen
from blocktune.methods.reshape.reshaped_attention import ReshapedAttention
from blocktune.methods.reshape.scaled_context import ScaledContext
from blocktune.methods.reshape.top_chunks import TopChunks

__all__ = ["RESHAPES", "Reshape", "ReshapedAttention", "ScaledContext", "Seen", "TopChunks"]
