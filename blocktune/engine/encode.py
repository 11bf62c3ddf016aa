"""Encoding chunks alone, and finding encoded ones again."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from blocktune.adapter import scope_of
from blocktune.attention import Plan, SplitPlan
from blocktune.cache import ChunkKV, ChunkStates, ChunkStore, Entry, states_key, stored_key
from blocktune.cache.chunk_file import ChunkFile, FileKV
from blocktune.cache.shelf import MissQueue
from blocktune.engine.usage import Stopwatch
from blocktune.methods.hooks import ChunkLoader
from blocktune.prompt import LayoutSpec, Pieces, Prompt, lay_out, stack

Ids = tuple[int, ...]
TOKENS_PER_PASS = 16_384
"""Rows, padding included, that are encoded in one forward pass."""


@dataclass(frozen=True)
class Piece:
    """What is encoded by itself and stored: the prefix, or a chunk after its blanks."""

    ids: Ids  # tokens that are stored
    blanks: Ids = ()  # tokens before it during encoding, whose own states are dropped
    is_prefix: bool = False  # whether it is the prefix, which no adapter of scope ``encode`` writes


def alone(piece: Piece) -> Prompt:
    """The rows of a piece by itself: its tokens from position 0, its blanks before that."""
    if piece.is_prefix:
        return lay_out(Pieces(prefix=piece.ids, chunks=(), query=()), LayoutSpec())
    chunk = Pieces(prefix=(), chunks=(piece.ids,), query=())
    return lay_out(chunk, LayoutSpec(), contexts=[piece.blanks])


def grouped(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces of similar length, as many as fit into a pass."""
    group: list[Piece] = []
    for piece in sorted(pieces, key=_size):
        if group and (len(group) + 1) * _size(piece) > TOKENS_PER_PASS:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _size(piece: Piece) -> int:
    return len(piece.blanks) + len(piece.ids)


class EncodeReport(NamedTuple):
    """What `Engine.encode` did: chunks given, newly encoded, tokens and seconds of those."""

    num_chunks: int
    num_encoded: int
    num_tokens: int
    encode_s: float


class Found(NamedTuple):
    """Encoded pieces: ``hits`` were in the store, ``misses`` had to be encoded.

    ``states`` are what each piece carried into the layers that were asked for.
    """

    kvs: dict[Piece, ChunkKV]
    hits: frozenset[Piece]
    misses: frozenset[Piece]
    states: dict[tuple[Piece, int], ChunkStates]


# A request asks several times for the key of each chunk: 0.1 ms for 512 tokens.
_stored_key = lru_cache(1024)(stored_key)
_Encoded = tuple[Piece, ChunkKV, dict[int, ChunkStates]]


class Encoder:
    """Turns pieces into their keys and values, through the store."""

    def __init__(self, model: nn.Module, store: ChunkStore, fingerprint: str, pad_id: int):
        """Encodes with ``model`` (attached to blocktune's attention) and keeps in ``store``."""
        self.model, self.store, self.tenant = model, store, ""
        self.fingerprint, self.pad_id = fingerprint, pad_id
        self._is_scoped = scope_of(model) != "both"

    def find(
        self,
        pieces: Sequence[Piece],
        watch: Stopwatch,
        layers: Sequence[int] = (),
        loader: ChunkLoader | None = None,
        documents: Mapping[Piece, str] | None = None,
        lazy: bool = False,
    ) -> Found:
        """Looks every piece up (by the ``loader``, if given) and encodes what is missing, once.

        The input states of ``layers`` (0-based) are wanted too: a piece that was encoded without
        them is encoded again. ``watch`` gets ``lookup_s``, ``load_s`` and ``encode_s``. What is
        encoded can be removed by the names of ``documents``. A ``lazy`` reader gets chunks that no
        memory will hold as `FileKV`: their layers are read when they are asked for.
        """
        kvs: dict[Piece, ChunkKV] = {}
        states: dict[tuple[Piece, int], ChunkStates] = {}
        missing = []
        for piece in dict.fromkeys(pieces):
            key = self.key(piece)
            entry = self._look_up(key, piece, ChunkKV, watch, loader, lazy)
            inputs = {
                layer: self._look_up(states_key(key, layer), piece, ChunkStates, watch)
                for layer in layers
            }
            if entry is None or None in inputs.values():
                missing.append(piece)
                continue
            kvs[piece] = entry
            states |= {(piece, layer): found for layer, found in inputs.items()}
        hits = frozenset(kvs)
        watch.start()
        for group in grouped(missing):
            started, tokens = time.perf_counter(), sum(map(_size, group))
            made = self._encode_together(group, layers)
            token_s = (time.perf_counter() - started) / tokens
            for piece, kv, inputs in made:
                about = {"seconds": token_s * _size(piece), "tenant": self.tenant}
                about["document"] = (documents or {}).get(piece, "")
                kvs[piece] = self.store.put(self.key(piece), kv, **about)
                for layer, entering in inputs.items():
                    key = states_key(self.key(piece), layer)
                    states[piece, layer] = self.store.put(key, entering, **about)
        watch.stop("encode_s")
        return Found(kvs, hits, frozenset(missing), states)

    def encode(
        self,
        prefix: Piece | None,
        chunks: Sequence[Piece],
        documents: Sequence[str],
        progress: Callable[[int, int], None] | None,
    ) -> EncodeReport:
        """See `Engine.encode`; ``documents`` are the names of the chunks'."""
        watch = Stopwatch(self.model.device)
        wanted = dict.fromkeys([*([prefix] if prefix else []), *chunks])
        names = dict(zip(chunks, documents, strict=True))
        new: set[Piece] = set()
        done, total = 0, sum(len(piece.ids) for piece in wanted)
        for group in grouped(wanted):  # only the store keeps them: a corpus does not fit in memory
            new |= self.find(group, watch, documents=names).misses
            done += sum(len(piece.ids) for piece in group)
            if progress is not None:
                progress(done, total)
        new.discard(prefix)
        tokens = sum(len(piece.ids) for piece in new)
        return EncodeReport(len(chunks), len(new), tokens, watch.seconds.get("encode_s", 0.0))

    def encode_wanted(self, most: int, longest: int) -> int:
        """See `Engine.encode_wanted`; chunks of more than ``longest`` tokens are left out."""
        queue = MissQueue(self.store.folder)
        wanted = queue.take(self.fingerprint, most)
        watch = Stopwatch(self.model.device)
        pieces = [Piece(*one) for one in wanted]
        for group in grouped(piece for piece in pieces if _size(piece) <= longest):
            self.find(group, watch)
        queue.done(self.fingerprint, wanted)
        return len(wanted)

    def salted(self, salt: str) -> Encoder:
        """See `Engine.salted`."""
        other = copy.copy(self)
        other.fingerprint = hashlib.sha256(f"{self.fingerprint} salt {salt}".encode()).hexdigest()
        other.tenant = other.fingerprint[:12]
        self.store.share_rope(self.fingerprint, other.fingerprint)
        return other

    def _look_up(
        self, key: str, piece: Piece, kind: type[Entry], watch, loader=None, lazy: bool = False
    ):
        if loader is not None:
            found = loader.lookup(key, piece.ids, self.fingerprint)
        else:
            read = FileKV.read if lazy and self.store.is_on_disk else ChunkFile.entry
            found = self.store.lookup(key, piece.ids, self.fingerprint, kind, read=read)
        watch.add("lookup_s", found.lookup_s)
        watch.add("load_s", found.load_s)
        return found.kv

    def key(self, piece: Piece) -> str:
        """Under which the store keeps a piece."""
        scoped = piece.is_prefix and self._is_scoped
        return _stored_key(self.fingerprint, piece.ids, piece.blanks, scoped)

    def sample(self) -> ChunkKV:
        """One token's keys and values, for their shapes and dtype."""
        [(_, kv, _)] = self._encode_together([Piece((self.pad_id,))], ())
        return kv

    @torch.no_grad()
    def _encode_together(self, pieces: list[Piece], layers: Sequence[int]) -> list[_Encoded]:
        batch = stack([alone(piece) for piece in pieces], self.pad_id).to(self.model.device)
        cache = DynamicCache()
        plan = InputRecorder(SplitPlan(batch.layout), layers)
        self.model(
            batch.input_ids,
            position_ids=batch.layout.position,
            plan=plan,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return [self._cut(cache, plan.inputs, index, piece) for index, piece in enumerate(pieces)]

    def _cut(self, cache: DynamicCache, inputs: dict[int, Tensor], index: int, piece: Piece):
        span, ids = slice(len(piece.blanks), _size(piece)), torch.tensor(piece.ids)
        keys = tuple(layer.keys[index, :, span] for layer in cache.layers)
        values = tuple(layer.values[index, :, span] for layer in cache.layers)
        states = {
            layer: ChunkStates(made[index, span], layer, ids, self.fingerprint).compact()
            for layer, made in inputs.items()
        }
        return piece, ChunkKV(keys, values, ids, self.fingerprint).compact(), states


class InputRecorder:
    """A plan that attends by another one, and keeps what entered some layers."""

    def __init__(self, plan: Plan, layers: Container[int]):
        """Keeps the hidden states ``(B, S, hidden)`` that enter ``layers``."""
        self.plan, self.layers = plan, layers
        self.inputs: dict[int, Tensor] = {}

    def attend(self, query, key, value, rule, params) -> Tensor:
        """Implements `Plan.attend`."""
        return self.plan.attend(query, key, value, rule, params)

    def enter(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        """A forward pre-hook that changes nothing."""
        if index in self.layers:
            self.inputs[index] = args[0]
