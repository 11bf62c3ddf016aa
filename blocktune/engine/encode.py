"""Encoding chunks alone, and finding encoded ones again."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from blocktune.adapter import scope_of
from blocktune.attention import Plan, SplitPlan, planned_forward
from blocktune.cache import ChunkKV, ChunkStates, ChunkStore, states_key, stored_key
from blocktune.cache.chunk_file import FileKV
from blocktune.cache.shelf import MissQueue
from blocktune.engine.usage import Stopwatch
from blocktune.methods.hooks import ChunkLoader
from blocktune.methods.press import Press
from blocktune.positions import RopeSpec
from blocktune.prompt import Chunk, LayoutSpec, Pieces, Prompt, lay_out, stack

Ids = tuple[int, ...]
TOKENS_PER_PASS = 16_384
"""Rows, padding included, that are encoded in one forward pass."""


@dataclass(frozen=True)
class Piece:
    """What is encoded by itself and stored: the prefix, or a chunk after its blanks."""

    ids: Ids  # tokens that are stored
    blanks: Ids = ()  # tokens before it during encoding, whose own states are dropped
    is_prefix: bool = False  # whether it is the prefix, which no adapter of scope ``encode`` writes

    @cached_property
    def _hash(self) -> int:
        return hash((self.ids, self.blanks, self.is_prefix))

    def __hash__(self):  # once for each piece: a prompt asks many times for each
        return self._hash


def wanted_pieces(prompt: Prompt) -> list[Piece]:
    """The prefix (if any), then the chunks, each with the blanks it is encoded after."""
    prefix = [Piece(prompt.prefix, is_prefix=True)] if prompt.prefix else []
    return prefix + [Piece(*chunk) for chunk in prompt.chunks]


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


def _document(chunk: Chunk) -> str:
    names = (chunk.metadata.get("document"), chunk.metadata.get("id"), chunk.title)
    return str(next((name for name in names if name is not None), ""))


class EncodeReport(NamedTuple):
    """What `Engine.encode` did: chunks given, newly encoded, tokens and seconds of those."""

    num_chunks: int
    num_encoded: int
    num_tokens: int
    encode_s: float


@dataclass
class Found:
    """Encoded pieces, and the tier of the store that had each (``none``: it had to be encoded)."""

    kvs: dict[Piece, ChunkKV] = field(default_factory=dict)
    states: dict[tuple[Piece, int], ChunkStates] = field(default_factory=dict)  # of layers asked
    tiers: dict[Piece, str] = field(default_factory=dict)

    @property
    def hits(self) -> set[Piece]:
        """Pieces that the store had."""
        return {piece for piece, tier in self.tiers.items() if tier != "none"}

    @property
    def misses(self) -> set[Piece]:
        """Pieces that had to be encoded."""
        return self.tiers.keys() - self.hits


REMEMBERED = 1024
"""Tokens of a piece whose key is remembered at most: keys of 512 tokens take 0.1 ms to make."""


@lru_cache(2048)
def _stored_key(fingerprint: str, piece: Piece, scoped: bool) -> str:
    return stored_key(fingerprint, piece.ids, piece.blanks, scoped)


_Encoded = tuple[Piece, ChunkKV, dict[int, ChunkStates]]


class Encoder:
    """Turns pieces into their keys and values, through the store."""

    def __init__(
        self,
        model: nn.Module,
        store: ChunkStore,
        fingerprint: str,
        pad_id: int,
        rope: RopeSpec | None = None,
        press: Press | None = None,
    ):
        """Encodes with ``model`` (attached to blocktune's attention) and keeps in ``store``.

        ``rope`` is the model's; ``press`` drops keys of the chunks.
        """
        self.model, self.store, self.tenant = model, store, ""
        self.fingerprint, self.pad_id, self.rope, self.press = fingerprint, pad_id, rope, press
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
        found = self.look_up(pieces, watch, layers, loader, lazy)
        watch.start()
        for group in grouped(piece for piece in found.tiers if piece not in found.kvs):
            started, tokens = time.perf_counter(), sum(map(_size, group))
            made = self._encode_together(group, layers)
            token_s = (time.perf_counter() - started) / tokens
            for piece, kv, inputs in made:
                about = {"seconds": token_s * _size(piece), "tenant": self.tenant}
                about["document"] = (documents or {}).get(piece, "")
                found.kvs[piece] = self.store.put(self.key(piece), kv, **about)
                for layer, entering in inputs.items():
                    key = states_key(self.key(piece), layer)
                    found.states[piece, layer] = self.store.put(key, entering, **about)
        watch.stop("encode_s")
        return found

    def look_up(
        self,
        pieces: Iterable[Piece],
        watch: Stopwatch,
        layers: Sequence[int] = (),
        loader: ChunkLoader | None = None,
        lazy: bool = False,
    ) -> Found:
        """What the store has of the pieces; see `find`, which encodes the others."""
        found, model, lookup_s, load_s = Found(), self.fingerprint, 0.0, 0.0
        look = (loader or self.store).lookup
        limits = self.store.config
        lazy = lazy and self.store.device.type == "cpu" and limits.memory + limits.cpu == 0
        how = {"read": FileKV.read} if lazy and not loader else {}
        for piece in dict.fromkeys(pieces):
            key = self.key(piece)
            looked = [look(key, piece.ids, model, **how)]
            for layer in layers:
                own = states_key(key, layer)
                looked.append(self.store.lookup(own, piece.ids, model, ChunkStates))
            complete = True
            for one in looked:
                lookup_s += one.lookup_s
                load_s += one.load_s
                complete = complete and one.kv is not None
            if not complete:
                found.tiers[piece] = "none"
                continue
            found.tiers[piece], found.kvs[piece] = looked[0].tier, looked[0].kv
            for layer, one in zip(layers, looked[1:], strict=True):
                found.states[piece, layer] = one.kv
        watch.add("lookup_s", lookup_s)
        watch.add("load_s", load_s)
        return found

    def encode(
        self,
        prefix: Piece | None,
        pieces: Sequence[Piece],
        chunks: Sequence[Chunk],
        progress: Callable[[int, int], None] | None,
    ) -> EncodeReport:
        """See `Engine.encode`; ``pieces`` are those of the ``chunks``."""
        watch = Stopwatch(self.model.device)
        wanted = dict.fromkeys([*([prefix] if prefix else []), *pieces])
        names = {piece: _document(chunk) for piece, chunk in zip(pieces, chunks, strict=True)}
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

    def salted(self, salt: str, what: str = "salt") -> Encoder:
        """See `Engine.salted`."""
        other, mixed = copy.copy(self), f"{self.fingerprint} {what} {salt}"
        other.fingerprint = hashlib.sha256(mixed.encode()).hexdigest()
        other.tenant = other.fingerprint[:12]
        self.store.share_rope(self.fingerprint, other.fingerprint)
        return other

    def key(self, piece: Piece) -> str:
        """Under which the store keeps a piece."""
        scoped = piece.is_prefix and self._is_scoped
        make = _stored_key if _size(piece) <= REMEMBERED else _stored_key.__wrapped__
        return make(self.fingerprint, piece, scoped)

    def sample(self) -> ChunkKV:
        """One token's keys and values, for their shapes and dtype."""
        [(_, kv, _)] = self._encode_together([Piece((self.pad_id,))], ())
        return kv

    @torch.no_grad()
    def _encode_together(self, pieces: list[Piece], layers: Sequence[int]) -> list[_Encoded]:
        whole = [alone(self._whole(piece)) for piece in pieces]
        batch = stack(whole, self.pad_id).to(self.model.device)
        cache = DynamicCache()
        plan = InputRecorder(SplitPlan(batch.layout), layers)
        positions = batch.layout.position
        with nullcontext() if self.press is None else self.press.watching(self.model) as seen:
            planned_forward(self.model, batch.input_ids, positions, plan, cache, logits_to_keep=1)
        made = cache, plan.inputs, seen
        return [self._cut(*made, index, piece) for index, piece in enumerate(pieces)]

    def _whole(self, piece: Piece) -> Piece:
        """What is encoded: of a chunk that is thinned, the tokens that are dropped, too."""
        if self.press is None or piece.is_prefix:
            return piece
        return Piece(piece.ids + piece.blanks)

    def _cut(
        self,
        cache: DynamicCache,
        inputs: dict[int, Tensor],
        seen: list[dict[str, Any]] | None,
        index: int,
        piece: Piece,
    ) -> _Encoded:
        whole, ids = self._whole(piece), torch.tensor(piece.ids)
        span = slice(len(whole.blanks), _size(whole))
        keys = tuple(layer.keys[index, :, span] for layer in cache.layers)
        values = tuple(layer.values[index, :, span] for layer in cache.layers)
        if self.press is not None and not piece.is_prefix:
            layers = zip(seen, keys, values, strict=True)
            thin = [self.press.thin(one, index, *kv) for one, *kv in layers]
            keys, values = (tuple(kind) for kind in zip(*thin, strict=True))
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
