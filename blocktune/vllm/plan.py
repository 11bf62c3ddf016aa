"""What a connector loads for a prompt: segments, their keys and places, and the cache's salt.

Nothing here imports vLLM. A plan is all or nothing: all of it is loaded, or the request fails.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blocktune.cache import stored_key
from blocktune.cache.store.shelf import Wanted
from blocktune.methods import Cached, Method, Nothing
from blocktune.prompt import LayoutSpec

PARAMS = "blocktune"  # key of a plan in vLLM's ``kv_transfer_params``
NULL_BLOCK = 0
"""vLLM's block for tokens that a group does not keep (outside of a sliding window)."""
FORM = (
    f"kv_transfer_params['{PARAMS}'] is {{'fingerprint': 64 hex digits, 'segments': [tokens or "
    "{'tokens', 'position', 'blanks', 'prefix', 'ids'}]}"
)
_FIELDS = {"tokens", "position", "blanks", "prefix", "ids"}


class Segment(NamedTuple):
    """Tokens that were encoded together: the prefix, or a chunk."""

    ids: tuple[int, ...]  # as encoded; learned tokens have ids that vLLM does not know
    position: int  # position of the first token in the prompt
    blanks: tuple[int, ...] = ()  # tokens that they were encoded after
    # whether it is the prefix of an adapter with scope ``encode`` or ``read``, which differs from a
    # chunk of the same tokens
    prefix: bool = False

    @property
    def wanted(self) -> Wanted:
        """Its entry in the encoding queue of a store that lacks it."""
        return Wanted(self.ids, self.blanks, self.prefix)

    def key(self, fingerprint: str) -> str:
        """Its key in the store."""
        return stored_key(fingerprint, self.ids, self.blanks, self.prefix)


@dataclass(frozen=True)
class LoadPlan:
    """The start of a prompt as consecutive stored segments."""

    fingerprint: str  # the model that encoded them
    segments: tuple[Segment, ...]  # in prompt order, from the prompt's first token on

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """The segments' keys in the store."""
        return tuple(segment.key(self.fingerprint) for segment in self.segments)

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """Index in the prompt of each segment's first token, then the total number of tokens."""
        return tuple(accumulate((len(segment.ids) for segment in self.segments), initial=0))

    @property
    def num_tokens(self) -> int:
        """Number of tokens in all segments."""
        return self.starts[-1]

    def wanted(self, start: int) -> range:
        """Indices of the segments with tokens from index ``start`` on."""
        return range(sum(end <= start for end in self.starts[1:]), len(self.segments))

    def missing(self, has: Callable[[str], bool]) -> list[Segment]:
        """Segments whose key a store does not have (``has``)."""
        return [one for one, key in zip(self.segments, self.keys, strict=True) if not has(key)]

    def salt(self, own: str | None = None) -> str:
        """Namespace in vLLM's prefix cache for this plan; ``own`` is the request's ``cache_salt``.

        vLLM names a cached block by the tokens up to it, assuming full attention. Reused chunks
        were encoded separately, so only prompts with the same segments may share their blocks.
        """
        named = [self.keys, [segment.position for segment in self.segments], own]
        return f"{PARAMS}:{hashlib.sha256(json.dumps(named).encode()).hexdigest()}"

    def params(self, prompt_ids: Sequence[int]) -> dict[str, Any]:
        """The value of ``kv_transfer_params``; ids are sent only if not those of ``prompt_ids``."""
        segments: list[Any] = []
        for segment, start in zip(self.segments, self.starts, strict=False):
            count = len(segment.ids)
            more: dict[str, Any] = {}
            if segment.position != start:
                more["position"] = segment.position
            if segment.blanks:
                more["blanks"] = list(segment.blanks)
            if segment.prefix:
                more["prefix"] = True
            if tuple(prompt_ids[start : start + count]) != segment.ids:
                more["ids"] = list(segment.ids)
            segments.append({"tokens": count} | more if more else count)
        return {PARAMS: {"fingerprint": self.fingerprint, "segments": segments}}

    @classmethod
    def read(
        cls, params: Mapping[str, Any] | None, prompt_ids: Sequence[int] | None
    ) -> LoadPlan | None:
        """The plan in a request, or None.

        Raises only ValueError, if the plan does not fit the prompt: vLLM must keep running.
        """
        if not isinstance(params, Mapping) or params.get(PARAMS) is None:
            return None
        raw = params[PARAMS] if isinstance(params[PARAMS], Mapping) else {}
        fingerprint, segments, start = str(raw.get("fingerprint")), [], 0
        if not re.fullmatch("[0-9a-f]{64}", fingerprint) or type(raw.get("segments")) is not list:
            raise ValueError(FORM)
        for given in raw["segments"]:
            given = {"tokens": given} if type(given) is int else given
            if not isinstance(given, Mapping) or given.keys() - _FIELDS:
                raise ValueError(FORM)
            count = given.get("tokens")
            position = given.get("position", start)
            if type(count) is not int or count < 1 or type(position) is not int or position < 0:
                raise ValueError(FORM)
            ids = _ids(given.get("ids", list((prompt_ids or ())[start : start + count])))
            if len(ids) != count:
                raise ValueError(
                    f"segment {len(segments)} has {count} tokens, its ids are {len(ids)}; {FORM}"
                )
            prefix = given.get("prefix", False) is True
            segments.append(Segment(ids, position, _ids(given.get("blanks", [])), prefix))
            start += count
        if not segments or start >= len(prompt_ids or ()):
            raise ValueError(
                f"segments of {start} tokens need a longer prompt, got "
                f"{len(prompt_ids or ())}: at least one token must be left to compute"
            )
        return cls(fingerprint, tuple(segments))


def _ids(values: Any) -> tuple[int, ...]:
    if not isinstance(values, list) or not all(type(v) is int and 0 <= v < 2**31 for v in values):
        raise ValueError(FORM)
    return tuple(values)


def slots_of(
    blocks: Sequence[int], block_size: int, start: int, stop: int
) -> tuple[Tensor, Tensor]:
    """The slots of tokens ``start .. stop - 1`` of a prompt in a paged cache of ``block_size``.

    Returns the tokens that have a slot (those inside the sliding window), and the slots; int64.
    """
    rows = torch.arange(start, stop)
    owner = torch.tensor(blocks, dtype=torch.int64)[rows // block_size]
    kept = owner != NULL_BLOCK
    return rows[kept], (owner * block_size + rows % block_size)[kept]


def require_served(method: Method, spec: LayoutSpec) -> None:
    """Checks that a connector, which only loads chunks, can serve a method.

    ``spec`` is that of `Method.layout_for`. Raises ValueError if vLLM's forward pass cannot do it.
    """
    selects = method.select() != Nothing() or method.layer_budget is not None
    reasons = {
        "takes no chunks from a cache": method.cached is not Cached.CHUNKS or not spec.block,
        "takes chunks from earlier prompts": method.history is not None,
        "recomputes tokens inside the context": selects,
        "changes how chunks are attended to": method.reshape() is not None,
        "computes link tokens between the chunks": spec.num_links > 0,
        f"places chunks '{spec.placement}', so that positions are not token indices": (
            spec.placement not in ("sequential", "composite")
        ),
    }
    if reason := next((text for text, applies in reasons.items() if applies), None):
        raise ValueError(
            f"vLLM cannot serve '{method.name}': it {reason}; use `blocktune serve`, or a method "
            "that only reuses chunks (naive, block-attention, turborag, link0, kv-packet)"
        )
