"""Exact states of prompts: a type that only a full prefill makes.

A chunk's relocated state is an approximation. Stored as the state of a prefix it would silently
spoil every later answer with the same prefix, so exact states have a type of their own, `ExactKV`,
which only `cut_exact` makes, from a cache that declares to be exact.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass
from typing import Any

from torch import Tensor

from blocktune.cache.chunk_kv import own

Ids = tuple[int, ...]
State = tuple[Tensor | None, ...]  # the recurrent state of one prompt at one depth, layer by layer
_FULL_PREFILL = object()


@dataclass(frozen=True, eq=False)
class ExactKV:
    """The state of a run of a prompt's tokens, computed after exactly the tokens before it.

    Raises:
        ValueError: If made by anything but `cut_exact`.
    """

    token_ids: Ids  # the run, ``S`` tokens
    context: Ids  # the tokens before it
    keys: tuple[Tensor, ...]  # of each layer that has any, ``(K, S, D)``, at their true positions
    values: tuple[Tensor, ...]  # likewise
    fingerprint: str  # of the model that ran
    # of recurrent layers, at some depths (tokens before the state) from the end of ``context`` to
    # the end of the run: only there can a prompt be resumed. None: the model has no recurrent
    # layer, and resumes anywhere
    states: Mapping[int, State] | None = None
    proof: InitVar[object] = None

    def __post_init__(self, proof: object):
        if proof is not _FULL_PREFILL:
            raise ValueError(
                "only a full prefill makes exact states; cut them from its cache with `cut_exact`"
            )

    @property
    def num_bytes(self) -> int:
        """Bytes of keys, values and tokens; those of states come on top, see `state_bytes`."""
        return sum(t.nbytes for t in (*self.keys, *self.values)) + 8 * len(self.token_ids)

    def cut(self, start: int, stop: int) -> ExactKV:
        """The tokens ``start`` to ``stop`` of the run, without states, in new memory."""
        return ExactKV(
            self.token_ids[start:stop],
            self.context + self.token_ids[:start],
            *(tuple(own(t[:, start:stop]) for t in kind) for kind in (self.keys, self.values)),
            self.fingerprint,
            None if self.states is None else {},
            proof=_FULL_PREFILL,
        )


def state_bytes(state: State | None) -> int:
    """Bytes of a recurrent state."""
    return sum(tensor.nbytes for tensor in state or () if tensor is not None)


def cut_exact(
    cache: Any,
    prompt: int,
    token_ids: Sequence[int],
    fingerprint: str,
    *,
    start: int = 0,
    states: Mapping[int, State] | None = None,
) -> ExactKV:
    """Cuts what the exact prefix cache may keep from the cache of a full prefill.

    Args:
        cache: A `RowCache` or `PrefillCache` after the prefill. Its columns ``0, 1, ..`` hold
            ``token_ids``, at positions equal to the columns.
        prompt: Index in the batch.
        token_ids: Tokens of the prompt, from its first on.
        fingerprint: Of the model that ran.
        start: Tokens that are left out, since the tree has them.
        states: Of recurrent layers, by depth.

    Returns:
        The state, in new memory.

    Raises:
        ValueError: If approximate states were ever loaded into the cache, or it was not
            declared exact, or is shorter than the tokens.
    """
    if not cache.exact:
        raise ValueError(
            "this cache holds approximate states (reused chunks); "
            "they must never enter the exact prefix cache"
        )
    if len(token_ids) > cache.num_columns:
        raise ValueError(f"{len(token_ids)} tokens, but the cache has {cache.num_columns} columns")
    layers = [layer for layer in cache.layers if getattr(layer, "keys", None) is not None]
    span, ids = slice(start, len(token_ids)), tuple(token_ids)
    return ExactKV(
        ids[span],
        ids[:start],
        tuple(layer.keys[prompt, :, span].clone() for layer in layers),
        tuple(layer.values[prompt, :, span].clone() for layer in layers),
        fingerprint,
        states,
        proof=_FULL_PREFILL,
    )
