"""Prefill for models whose chunks cannot be moved: in full, or resumed from an exact prefix.

Models with recurrent layers resume from the deepest checkpoint, others from any token. Stock
transformers compute each prompt alone, in a pass for each stretch between the checkpoints that the
prefix tree asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from blocktune.cache import PrefillCache, cut_exact
from blocktune.cache.chunk_kv import State
from blocktune.cache.exact import state_bytes
from blocktune.engine.assemble import Assembled
from blocktune.engine.generation import Generation
from blocktune.engine.layer_schedule import Prefill
from blocktune.engine.state import EngineState, ServedBatch
from blocktune.engine.usage import ModelCost
from blocktune.layout import Kind, Rows
from blocktune.methods import Cached, Method
from blocktune.prompt import Pieces, Prompt


@dataclass(kw_only=True)
class RecurrentPrefill(Prefill):
    """The result of the prefill, prompt by prompt, without plans."""

    context_tokens: Tensor  # computed in each layer, ``(B,)``
    written: Tensor  # bytes of computed keys, values and states, ``(B,)``

    def layer_tokens(self, num_layers: int) -> Tensor:
        return self.context_tokens[:, None].expand(-1, num_layers)

    def bytes_written(self, cache: object) -> Tensor:
        return self.written


class RecurrentGeneration(Generation):
    """A batch after its prefill, whose ``cache`` is a list with a `PrefillCache` per prompt."""

    def remember(self) -> None:
        """Does nothing: each prompt was cached during its prefill."""

    @torch.no_grad()
    def _decode(self, token: Tensor, rows: Rows, keys: Rows, step: int) -> Tensor:
        pairs = zip(self.cache, token.split(1), strict=True)
        return torch.cat([_run(self.state, cache, ids) for cache, ids in pairs])


@torch.no_grad()
def prefill_recurrent(
    state: EngineState, prompts: Sequence[Prompt], pieces: Sequence[Pieces], method: Method
) -> RecurrentGeneration:
    """Resumes each prompt from the prefix tree if the method does, and computes the rest."""
    served = ServedBatch.stacked(state, prompts, pieces, method)
    assembled = Assembled.empty(served.batch)
    runs = [_Run(served, assembled, index, prompt.ids) for index, prompt in enumerate(prompts)]
    logits = torch.cat([run.logits for run in runs])
    counts = torch.tensor([(run.context_tokens, run.written, run.macs) for run in runs])
    tokens, written, macs = counts.unbind(1)
    prefill = RecurrentPrefill(
        state.model, heads=0, extra=macs, logits=logits, context_tokens=tokens, written=written
    )
    return RecurrentGeneration(
        **vars(served) | {"cache": [run.cache for run in runs]},
        last=served.columns.map(lambda facts: facts[:, -1:]),
        assembled=assembled,
        prefill=prefill,
        executed=[prefill],
    )


TOKENS_PER_PASS = 32  # a pass over one token takes about as long as a pass over this many


class _Run:
    """A prompt's prefill from token ``start`` on; ``macs``: multiply-adds, without scans."""

    def __init__(self, served: ServedBatch, assembled: Assembled, index: int, ids: Sequence[int]):
        state, pieces, watch = served.state, served.pieces[index], served.watch
        self.state, self.cache = state, PrefillCache(state.model.config)
        self.macs = self.start = 0
        self.ids = torch.tensor([ids], device=state.model.device)
        context, has_states = pieces.shareable, state.recurrence.has_states
        states = {} if has_states else None
        tree, fingerprint = state.prefixes(served.method), state.encoder.fingerprint
        exact, found = served.method.cached is Cached.EXACT_PREFIX, (0, 0)
        watch.start()
        if exact:
            with tree.match(fingerprint, context) as match:
                watch.stop("lookup_s")
                passes = 0 if state.recurrence.several else len(ids) - match.num_tokens
                if match.num_tokens and passes * TOKENS_PER_PASS <= len(ids):  # else: recompute
                    self.cache.resume(match.num_tokens, match.layers(), match.state)
                    self.start, *found = match.num_tokens, match.num_bytes, match.disk_tokens
                watch.stop("load_s")
            assembled.found_prefix(served.batch.layout, index, pieces, self.start, *found)
            if has_states:
                ends = accumulate(map(len, (pieces.prefix, *pieces.chunks)))
                stops = tree.checkpoints_for(fingerprint, len(context), ends)
                states = self._states([stop for stop in stops if stop > self.start])
        self.logits = self._compute(self.cache, len(ids))
        watch.stop("recompute_s")
        if exact:
            run = cut_exact(self.cache, 0, context, fingerprint, start=self.start, states=states)
            tree.insert(run)
        self.context_tokens = int((served.columns.kind[index, self.start :] == Kind.CHUNK).sum())
        self.written = self.cache.key_bytes() + state_bytes(self.cache.state()) - found[0]

    def _states(self, stops: Sequence[int]) -> dict[int, State]:
        """Recurrent states at ``stops``; in separate caches where resuming takes a pass a token."""
        states = {}
        for stop in stops:
            on_the_way = self.state.recurrence.several or self.start
            cache = self.cache if on_the_way else PrefillCache(self.state.model.config)
            self._compute(cache, stop)
            states[stop] = cache.state()
        return states

    def _compute(self, cache: PrefillCache, stop: int) -> Tensor:
        state, ids = self.state, self.ids[:, cache.num_columns : stop]
        logits = _run(state, cache, ids)
        cost, rows = ModelCost.of(state.model), ids.shape[1]
        attending = [getattr(layer, "keys", None) is not None for layer in cache.layers]
        pairs = rows * (rows + 1) // 2 if rows == stop else rows * stop  # causal without a mask
        self.macs += cost.head
        for layer, attends in zip(cost.layers, attending, strict=True):
            self.macs += rows * layer.row + stop * layer.column + attends * pairs * cost.pair
        return logits


def _run(state: EngineState, cache: PrefillCache, ids: Tensor) -> Tensor:
    """Appends ``ids`` ``(1, S)`` to the cache. Returns the logits ``(1, V)`` after them."""
    logits = state.recurrence.run(state.model, cache, ids, fresh=not cache.num_columns)
    cache.num_columns += ids.shape[1]
    return logits
