"""States computed in exactly the context they are used in, kept apart from all others by type.

A chunk's relocated state is an approximation. Were it ever stored as if it were the result of a
full prefill, every later answer with the same prefix would silently inherit the error. Hence a
type of its own, which only `cut_exact` makes, and only from a cache that declares to be exact.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import InitVar, dataclass

import torch

from blocktune.cache.chunk_kv import ChunkKV
from blocktune.cache.row_cache import RowCache

_FULL_PREFILL = object()


@dataclass(frozen=True, eq=False)
class ExactKV:
    """The state of one piece of a prompt, computed after exactly the tokens before it.

    Attributes:
        kv: Keys at their true positions: ``kv.origin`` is the number of tokens before it.
        context: Digest of those tokens, `context_digest`.

    Raises:
        ValueError: If made by anything but `cut_exact`.
    """

    kv: ChunkKV
    context: str
    proof: InitVar[object] = None

    def __post_init__(self, proof: object):
        if proof is not _FULL_PREFILL:
            raise ValueError(
                "only a full prefill makes exact states; cut them from its cache with `cut_exact`"
            )


def context_digest(pieces: Iterable[Sequence[int]]) -> str:
    """Digest of all tokens of ``pieces``, joined: where the cuts are does not count."""
    joined = [token for piece in pieces for token in piece]
    return hashlib.sha256(torch.tensor(joined, dtype=torch.int64).numpy().tobytes()).hexdigest()


def cut_exact(
    cache: RowCache, prompt: int, pieces: Sequence[Sequence[int]], fingerprint: str
) -> tuple[ExactKV, ...]:
    """Cuts the cache of a full prefill into pieces for the exact prefix cache.

    Args:
        cache: After the prefill. Its columns ``0, 1, ..`` hold the tokens of ``pieces`` in
            order, at positions equal to the columns.
        prompt: Index in the batch.
        pieces: Token ids of prefix, first chunk, second chunk and so on.
        fingerprint: Of the model that ran.

    Returns:
        One `ExactKV` a piece that has tokens, in memory of its own.

    Raises:
        ValueError: If approximate states were ever loaded into the cache, or it was not
            declared exact, or is shorter than the pieces.
    """
    if not cache.exact:
        raise ValueError(
            "this cache holds approximate states (reused chunks); "
            "they must never enter the exact prefix cache"
        )
    total = sum(map(len, pieces))
    if total > cache.num_columns:
        raise ValueError(f"the pieces have {total} tokens, the cache {cache.num_columns} columns")
    pieces = [piece for piece in pieces if len(piece)]
    layers = [layer for layer in cache.layers if layer.is_initialized]
    cuts, start = [], 0
    for index, piece in enumerate(pieces):
        span = slice(start, start + len(piece))
        kv = ChunkKV(
            keys=tuple(layer.keys[prompt, :, span] for layer in layers),
            values=tuple(layer.values[prompt, :, span] for layer in layers),
            token_ids=torch.tensor(piece, dtype=torch.int64),
            fingerprint=fingerprint,
            origin=start,
        )
        cuts.append(ExactKV(kv.compact(), context_digest(pieces[:index]), proof=_FULL_PREFILL))
        start = span.stop
    return tuple(cuts)


def load_exact(cache: RowCache, prompt: int, exact: ExactKV) -> None:
    """Writes a piece of an exact prefix into ``cache``, which stays as exact as it was.

    In an exact prefix the column is the position.
    """
    kv = exact.kv
    columns = slice(kv.origin, kv.origin + kv.num_tokens)
    for layer, (keys, values) in enumerate(zip(kv.keys, kv.values, strict=True)):
        own_keys, own_values = cache.room(layer, prompt, columns, keys, values, exact=True)
        own_keys.copy_(keys)
        own_values.copy_(values)
