"""Encodes chunks independently of each other, and looks encoded chunks up in the store."""

from __future__ import annotations

import copy
import hashlib
import time
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from blocktune.adapter import scope_of
from blocktune.attention import Plan, SplitPlan, is_attached, planned_forward
from blocktune.cache import ChunkKV, ChunkStates, ChunkStore, RowCache, states_key, stored_key
from blocktune.cache.row_cache import refuse_autocast
from blocktune.cache.store.chunk_file import FileKV
from blocktune.cache.store.shelf import MissQueue
from blocktune.engine.usage import Stopwatch
from blocktune.methods.base import ChunkLoader
from blocktune.methods.press import Press
from blocktune.positions import RopeSpec
from blocktune.prompt import Chunk, LayoutSpec, Pieces, Prompt, lay_out, stack

Ids = tuple[int, ...]
Encoded = tuple[ChunkKV, dict[int, ChunkStates]]  # a piece's, and its input states by layer
NOT_AHEAD = "method '{}' reuses no chunks that were encoded ahead; name one that does"


@dataclass(frozen=True)
class Piece:
    """A unit that is encoded by itself and stored: the prefix, or a chunk after its blanks."""

    ids: Ids  # tokens whose states are stored
    blanks: Ids = ()  # tokens before it during encoding, whose own states are dropped
    is_prefix: bool = False  # a prefix is encoded without adapters of scope ``encode``

    @cached_property
    def _hash(self) -> int:
        return hash((self.ids, self.blanks, self.is_prefix))

    def __hash__(self):  # cached, because each prompt hashes its pieces many times
        return self._hash


def wanted_pieces(prompt: Prompt) -> list[Piece]:
    """Pieces of a prompt: the prefix (if any), then the chunks, each with its blanks."""
    prefix = [Piece(prompt.prefix, is_prefix=True)] if prompt.prefix else []
    return prefix + [Piece(*chunk) for chunk in prompt.chunks]


def alone(piece: Piece) -> Prompt:
    """Lays a piece out by itself: its tokens from position 0, its blanks before that."""
    prefix, chunks = (piece.ids, ()) if piece.is_prefix else ((), (piece.ids,))
    return lay_out(Pieces(prefix, chunks, ()), LayoutSpec(), contexts=[piece.blanks] * len(chunks))


def grouped(pieces: Iterable[Piece], most: int) -> Iterator[list[Piece]]:
    """Yields groups of pieces of similar length, of ``most`` tokens with padding, or of one."""
    group: list[Piece] = []
    for piece in sorted(pieces, key=_size):
        if group and (len(group) + 1) * _size(piece) > most:
            yield group
            group = []
        group.append(piece)
    if group:
        yield group


def _size(piece: Piece) -> int:
    return len(piece.blanks) + len(piece.ids)


def _joined(*names: str) -> str:
    """Distinct names of documents, one a line, as an entry of the store has them."""
    return "\n".join(dict.fromkeys(filter(None, "\n".join(names).split("\n"))))


def documents_of(pieces: Iterable[Piece], chunks: Iterable[Chunk]) -> dict[Piece, str]:
    """The documents of the chunks' pieces, by which `store rm --document` finds them."""
    documents: dict[Piece, list[str]] = {}
    for piece, chunk in zip(pieces, chunks, strict=True):
        documents.setdefault(piece, []).append(chunk.document)
    return {piece: _joined(*own) for piece, own in documents.items()}


class EncodeReport(NamedTuple):
    """Result of `Engine.encode`."""

    num_chunks: int  # chunks given
    num_encoded: int  # chunks newly encoded; tokens and seconds are of these
    num_tokens: int
    encode_s: float


@dataclass
class Found:
    """Encoded pieces, and the store's tier where each was found (``none``: newly encoded)."""

    kvs: dict[Piece, ChunkKV] = field(default_factory=dict)
    states: dict[tuple[Piece, int], ChunkStates] = field(default_factory=dict)  # by layer
    tiers: dict[Piece, str] = field(default_factory=dict)

    @property
    def misses(self) -> set[Piece]:
        """Pieces that had to be encoded."""
        return {piece for piece, tier in self.tiers.items() if tier == "none"}


@dataclass(eq=False)
class Encoder:
    """Encodes pieces into keys and values, with the store as a cache."""

    model: nn.Module  # attached
    store: ChunkStore
    fingerprint: str
    pad_id: int
    rope: RopeSpec | None
    press: Press | None  # drops keys of the chunks
    tenant: str = ""

    def __post_init__(self):
        # Most tokens of a pass, with padding. More is slower on a CPU, whose C library then takes
        # new pages for the activations of every layer.
        self.pass_tokens = 2048 if self.model.device.type == "cpu" else 16_384
        self._is_scoped = scope_of(self.model) != "both"
        self._parameters = list(self.model.parameters())
        parts = self.model.modules()  # a model has a method of the name
        self._tuned = [p for p in parts if isinstance(getattr(p, "disable_adapters", 0), bool)]
        self._made_with = self._weights()

    def _weights(self) -> tuple:
        """Facts that tell cheaply whether the weights are still those of the fingerprint."""
        first = self._parameters[0]
        changes = sum(0 if p.is_inference() else p._version for p in self._parameters)
        state = [
            (part.disable_adapters, [*map(getattr(part, "scaling", {}).get, part.active_adapters)])
            for part in self._tuned
        ]
        active = getattr(self.model, "active_adapter", None)
        return first.dtype, first.device, changes, active, state

    def require_model(self, caches: bool = True) -> None:
        """Raises ValueError if the model trains, is detached or, for ``caches``, changed."""
        if self.model.training:
            raise ValueError("the engine's model is in training mode; call its eval()")
        if self.rope is not None and not is_attached(self.model):
            raise ValueError("the engine's model was detached; call blocktune.attach(engine.model)")
        if caches and self._weights() != self._made_with:
            raise ValueError(
                "the model's weights, dtype, device or adapter changed after its engine was made; "
                "undo that, or make a new Engine(model, tokenizer)"
            )

    def find(
        self,
        pieces: Sequence[Piece],
        watch: Stopwatch,
        layers: Sequence[int] = (),
        loader: ChunkLoader | None = None,
        documents: Mapping[Piece, str] | None = None,
        lazy: bool = False,
    ) -> Found:
        """Looks every piece up (by the ``loader``, if given) and encodes the missing ones.

        A piece that was encoded without the input states of ``layers`` (0-based) is missing. New
        entries are stored under the names of their ``documents``. With ``lazy``, chunks that the
        store does not keep in memory are returned as `FileKV`, whose file is read later.
        """
        found = self.look_up(pieces, watch, layers, loader, lazy)
        watch.start()
        missing = [piece for piece in found.tiers if piece not in found.kvs]
        for group in grouped(missing, self.pass_tokens):
            started, tokens = time.perf_counter(), sum(map(_size, group))
            encoded = self._encode_together(group, layers)
            token_s = (time.perf_counter() - started) / tokens
            for piece, (kv, inputs) in zip(group, encoded, strict=True):
                about = {"tenant": self.tenant, "document": (documents or {}).get(piece, "")}
                about["seconds"] = token_s * _size(piece)
                found.kvs[piece] = self.store.put(self.key(piece), kv, **about)
                for layer, states in inputs.items():
                    key = states_key(self.key(piece), layer)
                    found.states[piece, layer] = self.store.put(key, states, **about)
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
        """Looks pieces up like `find`, but encodes nothing."""
        found, store, limits = Found(), self.store, self.store.config
        # Files are read into CPU memory.
        lazy = lazy and self.model.device.type == "cpu" and limits.memory + limits.cpu == 0
        how = {"read": FileKV.read} if lazy and not loader else {}
        for piece in dict.fromkeys(pieces):
            key, of_piece = self.key(piece), (piece.ids, self.fingerprint)
            own = (loader or store).lookup(key, *of_piece, **how)
            keys = (states_key(key, layer) for layer in layers)
            states = [store.lookup(one, *of_piece, ChunkStates) for one in keys]
            for result in (own, *states):
                watch.add("lookup_s", result.lookup_s)
                watch.add("load_s", result.load_s)
            found.tiers[piece] = "none"
            if all(result.kv is not None for result in (own, *states)):
                found.tiers[piece], found.kvs[piece] = own.tier, own.kv
                found.states |= {(piece, n): s.kv for n, s in zip(layers, states, strict=True)}
        return found

    def encode(
        self,
        prefix: Piece | None,
        pieces: Sequence[Piece],
        chunks: Sequence[Chunk],
        layers: Sequence[int],
        progress: Callable[[int, int], None] | None,
    ) -> EncodeReport:
        """See `Engine.encode`; ``pieces`` are those of the ``chunks``, ``layers`` as in `find`."""
        watch = Stopwatch(self.model.device)
        unique = dict.fromkeys(pieces if prefix is None else [prefix, *pieces])
        names, new = documents_of(pieces, chunks), set[Piece]()
        done, total = 0, sum(len(piece.ids) for piece in unique)
        # Results are not kept here: those of a corpus do not fit in memory.
        for group in grouped(unique, self.pass_tokens):
            missing = [p for p in group if not self._is_stored(p, layers, names.get(p, ""))]
            found = self.find(missing, watch, layers=layers, documents=names)
            new |= found.misses
            for piece in (found.tiers.keys() - found.misses) & names.keys():
                self.name(piece, found.kvs[piece], names[piece])
            done += sum(len(piece.ids) for piece in group)
            if progress is not None:
                progress(done, total)
        new.discard(prefix)
        tokens = sum(len(piece.ids) for piece in new)
        return EncodeReport(len(chunks), len(new), tokens, watch.seconds.get("encode_s", 0.0))

    def encode_wanted(self, most: int, longest: int) -> int:
        """See `Engine.encode_wanted`. Skips chunks of more than ``longest`` or unknown tokens."""
        queue = MissQueue(self.store.folder)
        wanted = queue.take(self.fingerprint, most)
        watch = Stopwatch(self.model.device)
        known = self.model.get_input_embeddings().num_embeddings
        pieces = [p for p in (Piece(*chunk) for chunk in wanted) if p.ids and _size(p) <= longest]
        pieces = [p for p in pieces if all(0 <= i < known for i in p.ids + p.blanks)]
        for group in grouped(pieces, self.pass_tokens):
            self.find(group, watch)
        queue.done(self.fingerprint, wanted)
        return len(wanted)

    def salted(self, salt: str, tenant: str = "", what: str = "salt") -> Encoder:
        """See `Engine.salted`."""
        other, mixed = copy.copy(self), f"{self.fingerprint} {what} {salt}"
        other.fingerprint = hashlib.sha256(mixed.encode()).hexdigest()
        other.tenant = tenant or other.fingerprint[:12]
        self.store.share_rope(self.fingerprint, other.fingerprint)
        return other

    def _is_stored(self, piece: Piece, layers: Sequence[int], document: str) -> bool:
        """Whether files hold a piece, with its documents, and its states. Reads no tensors."""
        key, of_piece = self.key(piece), (piece.ids, self.fingerprint)
        row = self.store.stored(key, *of_piece)
        states = (self.store.stored(states_key(key, n), *of_piece, ChunkStates) for n in layers)
        return row is not None and _joined(row.document, document) == row.document and all(states)

    def name(self, piece: Piece, kv: ChunkKV, document: str) -> None:
        """Stores a chunk again under its documents, unless it has their names."""
        row = self.store.row(self.key(piece))
        if row is not None and (names := _joined(row.document, document)) != row.document:
            about = {"document": names, "tenant": row.tenant, "seconds": row.seconds}
            self.store.put(row.key, kv, **about)

    def key(self, piece: Piece) -> str:
        """The store's key of a piece."""
        scoped = piece.is_prefix and self._is_scoped
        return stored_key(self.fingerprint, piece.ids, piece.blanks, scoped)

    def sample(self) -> ChunkKV:
        """Keys and values of a single token, as an example of shapes and dtype."""
        return self._encode_together([Piece((self.pad_id,))], ())[0][0]

    @torch.no_grad()
    def _encode_together(self, pieces: list[Piece], layers: Sequence[int]) -> list[Encoded]:
        self.require_model()
        prompts = [alone(self._unpruned(piece)) for piece in pieces]
        batch = stack(prompts, self.pad_id).to(self.model.device)
        cache = DynamicCache()
        plan = _InputRecorder(SplitPlan(batch.layout), layers)
        positions = batch.layout.position
        with nullcontext() if self.press is None else self.press.watching(self.model) as seen:
            planned_forward(self.model, batch.input_ids, positions, plan, cache, logits_to_keep=1)
        made = cache, plan.inputs, seen
        return [self.extract(*made, index, piece) for index, piece in enumerate(pieces)]

    def _unpruned(self, piece: Piece) -> Piece:
        """The piece to encode: if a press prunes it, with the tokens that are dropped later."""
        is_whole = self.press is None or piece.is_prefix
        return piece if is_whole else Piece(piece.ids + piece.blanks)

    def extract(
        self,
        cache: DynamicCache | RowCache,
        inputs: dict[int, Tensor],
        seen: list[dict[str, Any]] | None,
        index: int,
        piece: Piece,
    ) -> Encoded:
        """Copies a piece from row ``index`` of the cache of its pass."""
        encoded, ids = self._unpruned(piece), torch.tensor(piece.ids)
        span = slice(len(encoded.blanks), _size(encoded))
        keys = tuple(layer.keys[index, :, span] for layer in cache.layers)
        values = tuple(layer.values[index, :, span] for layer in cache.layers)
        if self.press is not None and not piece.is_prefix:
            layers = zip(seen, keys, values, strict=True)
            pruned = [self.press.thin(layer, index, *kv) for layer, *kv in layers]
            keys, values = (tuple(kind) for kind in zip(*pruned, strict=True))
        states = {
            layer: ChunkStates(hidden[index, span], layer, ids, self.fingerprint).compact()
            for layer, hidden in inputs.items()
        }
        return ChunkKV(keys, values, ids, self.fingerprint).compact(), states


class _InputRecorder:
    """Attends by another plan, and records the hidden states at the input of some layers."""

    def __init__(self, plan: Plan, layers: Container[int]):
        self.plan, self.layers = plan, layers
        self.inputs: dict[int, Tensor] = {}  # by layer, ``(B, S, hidden)``

    def attend(self, query, key, value, rule, params) -> Tensor:
        refuse_autocast(key)
        return self.plan.attend(query, key, value, rule, params)

    def enter(self, index: int, layer: nn.Module, args: tuple, kwargs: dict) -> None:
        if index in self.layers:
            self.inputs[index] = args[0]
