"""Hidden states at the input of a layer: from them that layer can be computed anew for all tokens.

DroidSpeak (arXiv:2411.02820) calls them the E-cache. A layer's input takes ``hidden`` numbers a
token where its keys and values take ``2 * kv_heads * head_dim``, so only the layers that a method
starts from are kept, each as an entry of its own beside the chunk's keys and values.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from blocktune.cache.chunk_kv import Entry, Read


@dataclass(frozen=True, eq=False)
class ChunkStates(Entry):
    """What a chunk's tokens carried into one layer, as the chunk alone made it.

    Attributes:
        states: ``(S, hidden)``, before the layer's norm. Free of positions: nothing to relocate.
        layer: 0-based layer that they enter.
        token_ids: What was encoded, ``(S,)`` int64, without the blanks before it.
        fingerprint: Hex digest of the model that encoded it.

    Raises:
        ValueError: If the tensors do not describe one chunk at one layer.
    """

    kind: ClassVar[str] = "states"
    states: Tensor
    layer: int
    token_ids: Tensor
    fingerprint: str

    def __post_init__(self):
        if self.token_ids.dtype != torch.int64 or self.token_ids.ndim != 1:
            raise ValueError(
                "token ids of states must be one int64 row (tokens,); "
                f"got {tuple(self.token_ids.shape)} {self.token_ids.dtype}"
            )
        wanted = (self.states.ndim, len(self.states)) == (2, self.num_tokens)
        if not wanted or not self.num_tokens or not self.states.dtype.is_floating_point:
            raise ValueError(
                f"states of a chunk of {self.num_tokens} tokens must be floating "
                f"(tokens, hidden); got {tuple(self.states.shape)} {self.states.dtype}"
            )
        if self.layer < 0:
            raise ValueError(f"states enter a layer >= 0; got {self.layer}")

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Entry.tensors`."""
        yield "states", self.states

    def facts(self) -> dict[str, int]:
        """See `Entry.facts`."""
        return {"layer": self.layer}

    @classmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
        """See `Entry.restore`."""
        return cls(read("states"), int(facts["layer"]), token_ids, fingerprint)


def states_key(chunk_key: str, layer: int) -> str:
    """Key of a chunk's states at ``layer``: the chunk's own key, which names its content, hashed.

    Args:
        chunk_key: From `blocktune.cache.chunk_key`.
        layer: 0-based.
    """
    return hashlib.sha256(f"{chunk_key} states {layer}".encode()).hexdigest()
