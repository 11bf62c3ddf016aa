"""The engine: answers from chunk caches by any method, on stock models."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.adapter import AdapterInfo, scope_of
from blocktune.adapter.load import load_model
from blocktune.attention import attach
from blocktune.cache import ChunkStore, PrefixTree, model_fingerprint
from blocktune.cache.fingerprint import manifest
from blocktune.cache.shelf import MissQueue
from blocktune.data.example import RagExample, read_chunks
from blocktune.engine import context_cache
from blocktune.engine.batch_prefill import prefill_batch
from blocktune.engine.context_cache import CachedContext
from blocktune.engine.encode import Encoder, Piece, grouped
from blocktune.engine.generation import Answer, Generation, Sampling
from blocktune.engine.layer_schedule import install
from blocktune.engine.prompts import PromptMaker, Request, as_request
from blocktune.engine.state import Auxiliaries, EngineState
from blocktune.engine.usage import Stopwatch
from blocktune.links import link_base
from blocktune.methods import Method, build
from blocktune.models.gate import require_supported
from blocktune.models.recurrent import REUSE_REFUSED, find_recurrence
from blocktune.prompt import Chunk, LayoutSpec, Pieces, Prompt, PromptFormat
from blocktune.prompt.special_tokens import padding_id

NO_LIMIT = 1 << 30
"""Tokens of a context where the model's configuration names no limit."""


class EncodeReport(NamedTuple):
    """What `Engine.encode` did: chunks given, newly encoded, tokens and seconds of those."""

    num_chunks: int
    num_encoded: int
    num_tokens: int
    encode_s: float


class Engine:
    """Answers questions over chunks by any reuse method.

    ```python
    engine = Engine.from_pretrained("data/tiny", adapter="out/block_attention")
    answer = engine.answer([example], method="block-attention")[0]
    print(answer.text, answer.usage.recompute_ratio, answer.usage.ttft_s)
    ```

    Several threads may answer at once: what a request changes is its own, and its caches are
    locked.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        format: PromptFormat | None = None,
        adapter: AdapterInfo | None = None,
        adapter_folder: str | Path | None = None,
        store: ChunkStore | None = None,
        prefix_tree: PrefixTree | None = None,
    ):
        """Takes a loaded model over: its attention is switched to blocktune's.

        Args:
            model: A RoPE decoder, with its adapter attached or merged; or one with recurrent
                layers (Mamba-2, Qwen3-Next, Falcon-H1, Jamba, ...), which is left as it is: it
                serves only methods that reuse no chunk.
            tokenizer: The model's.
            format: Wording of prompts; default: the adapter's, else `PromptFormat`'s.
            adapter: What the model's adapter was trained for, if it has one.
            adapter_folder: Where its files are: they count in the cache's fingerprint.
            store: Where encoded chunks are kept; default: memory.
            prefix_tree: Where exact prefixes are kept; default: memory, and the folder of ``store``
                for what must leave it.

        Raises:
            ValueError: If the model cannot be served from moved chunk caches, or ``format``
                differs from what the adapter was trained with.
        """
        recurrence = find_recurrence(model)
        rope = None
        if recurrence is None:
            rope = require_supported(model)
            attach(model)
            install(model)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.adapter = adapter
        self.format = format or (adapter.format if adapter else PromptFormat())
        if adapter and self.format != adapter.format:
            raise ValueError(
                f"the adapter was trained with the prompt format {adapter.format}, got "
                f"{self.format}; leave the format out to use the adapter's"
            )
        if adapter and adapter.scope != scope_of(model):
            raise ValueError(
                f"the adapter has scope '{adapter.scope}' and the model '{scope_of(model)}'; call "
                "blocktune.adapter.attach_links on what PEFT loaded (a merged model cannot be used)"
            )
        self.store = ChunkStore(device=model.device) if store is None else store
        words = dataclasses.asdict(self.format)
        self.fingerprint = model_fingerprint(model, adapter_folder, tokenizer, words)
        num_tokens = link_base(model)
        pad_id = padding_id(tokenizer, num_tokens)
        encoder = Encoder(model, self.store, self.fingerprint, pad_id)
        if rope is not None:
            self.store.describe(
                self.fingerprint,
                lambda: manifest(
                    *(model, tokenizer, words, adapter, adapter_folder, rope), encoder.sample()
                ),
                rope,
            )
        self._state = EngineState(
            model,
            tokenizer,
            encoder,
            PrefixTree(store=self.store) if prefix_tree is None else prefix_tree,
            rope,
            pad_id,
            Auxiliaries(model, tokenizer),
            recurrence,
        )
        config = model.config.get_text_config()
        self.prompts = PromptMaker(
            tokenizer,
            self.format,
            trained=adapter.layout if adapter else None,
            link_base=adapter.link_base(model, tokenizer) if adapter else None,
            max_tokens=getattr(config, "max_position_embeddings", NO_LIMIT),  # Mamba has none
            num_layers=config.num_hidden_layers,
            recurrent=recurrence is not None,
            num_tokens=num_tokens,
            exact_tokens=rope.max_tokens if rope else None,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str | None = None,
        adapter: str | Path | None = None,
        *,
        store: str | Path | ChunkStore | None = None,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        quantize: str | None = None,
        format: PromptFormat | None = None,
    ) -> Engine:
        """Loads a model (and an adapter trained by blocktune) from a folder or the HF Hub.

        Args:
            model: Folder or repository name; None: the base that the adapter was trained on.
            adapter: Folder or repository name of an adapter, or None.
            store: Where encoded chunks are kept: a folder, or any text that `ChunkStore.open`
                takes (or a store); None: memory only.
            dtype: As `from_pretrained` of transformers takes it.
            device: Such as ``cuda:0``; default: CUDA if there is one.
            revision: Of the model's repository.
            quantize: One of `blocktune.models.quantize.QUANTIZATIONS`; None: as saved.
            format: Wording of prompts; default: the adapter's.

        Raises:
            ValueError: If there is no such model or adapter, or they do not fit.
        """
        options = {"dtype": dtype, "device": device, "revision": revision, "quantize": quantize}
        base, tokenizer, info, folder = load_model(model, adapter, **options)
        if isinstance(store, str | Path):
            store = ChunkStore.open(store, device=base.device)
        return cls(base, tokenizer, format=format, adapter=info, adapter_folder=folder, store=store)

    def encode(
        self, chunks: Any, progress: Callable[[int, int], None] | None = None
    ) -> EncodeReport:
        """Encodes chunks (and the prefix of all prompts) into the store ahead of any request.

        Each is kept under the name of its document: ``document`` or ``id`` of its metadata, else
        its title. `ChunkStore.discard_where` and `blocktune store rm --document` remove by it.

        Args:
            chunks: Passages in any form that `RagExample.chunks` takes.
            progress: Called with tokens done and tokens in all after each pass.
        """
        chunks = read_chunks(chunks)
        watch = Stopwatch(self.model.device)
        prefix, pieces = self.prompts.encodable(chunks)
        wanted = dict.fromkeys([*([prefix] if prefix else []), *pieces])
        documents = {p: _document(chunk) for p, chunk in zip(pieces, chunks, strict=True)}
        new: set[Piece] = set()
        done, total = 0, sum(len(piece.ids) for piece in wanted)
        for group in grouped(wanted):  # only the store keeps them: a corpus does not fit in memory
            new |= self._state.encoder.find(group, watch, documents=documents).misses
            done += sum(len(piece.ids) for piece in group)
            if progress is not None:
                progress(done, total)
        new.discard(prefix)
        tokens = sum(len(piece.ids) for piece in new)
        return EncodeReport(len(chunks), len(new), tokens, watch.seconds.get("encode_s", 0.0))

    def encode_wanted(self, most: int = 256) -> int:
        """Encodes chunks that readers of the store missed, see `blocktune.cache.shelf`.

        Args:
            most: Chunks at a time.

        Returns:
            Chunks that were wanted.

        Raises:
            ValueError: If the store has no folder.
        """
        if self.store.folder is None:
            raise ValueError("chunks are wanted in a folder; give the engine a store with one")
        queue = MissQueue(self.store.folder)
        wanted = queue.take(self.fingerprint, most)
        watch, room = Stopwatch(self.model.device), self.prompts.max_tokens
        fitting = [Piece(*one) for one in wanted if len(one.ids) + len(one.blanks) <= room]
        for group in grouped(fitting):
            self._state.encoder.find(group, watch)
        queue.done(self.fingerprint, wanted)
        return len(wanted)

    def add_auxiliary(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Gives a loaded model a name by which selectors may ask it (``cacheclip``).

        Folders and repository names need not be added: they are loaded on first use.

        Raises:
            ValueError: If its tokenizer is not the served model's.
        """
        self._state.auxiliaries.add(name, model, tokenizer)

    def forget(self) -> None:
        """Empties the memory of chunks and of exact prefixes: the next answer finds nothing."""
        self.store.clear()
        self.forget_prefixes()

    def reworded(self, format: PromptFormat) -> Engine:
        """The same model and caches, asked in another wording, whatever the adapter's was."""
        other = copy.copy(self)
        other.format, other.prompts = format, dataclasses.replace(self.prompts, format=format)
        return other

    def salted(self, salt: str) -> Engine:
        """The same model, whose chunks and prefixes only engines of the same salt find.

        The salt goes into the fingerprint, and so into every key of the store.

        Args:
            salt: Of a tenant; an empty one returns this engine.
        """
        if not salt:
            return self
        other, encoder = copy.copy(self), copy.copy(self._state.encoder)
        mixed = hashlib.sha256(f"{self.fingerprint} salt {salt}".encode()).hexdigest()
        other.fingerprint = encoder.fingerprint = mixed
        encoder.tenant = mixed[:12]
        self.store.share_rope(self.fingerprint, mixed)
        other._state = dataclasses.replace(self._state, encoder=encoder)
        return other

    @property
    def state(self) -> EngineState:
        """The model and the caches that its batches share."""
        return self._state

    def forget_prefixes(self) -> None:
        """Empties the exact prefix cache: the next prompt finds nothing of those before it."""
        self._state.prefix_tree.clear()

    def answer(
        self,
        examples: Sequence[Request | Mapping[str, Any]],
        method: str | Method = "naive",
        *,
        max_new_tokens: int = 32,
        sampling: Sampling | None = None,
        batch_size: int = 8,
    ) -> list[Answer]:
        """Answers examples by a method, in batches of prompts of similar length.

        Args:
            examples: Questions with their chunks: `RagExample`, or rows of a data set such as
                ``{"question": ..., "chunks": [...]}``, with chunks in any form it takes.
            method: Name or a built `Method`.
            max_new_tokens: Tokens to decode at most.
            sampling: How tokens are picked; default greedy.
            batch_size: Prompts served together.

        Returns:
            One answer per example, in their order, with the chunks as they were read.

        Raises:
            ValueError: If the method is unknown or does not fit the model's adapter, or a prompt
                does not fit the model's context.
        """
        method = built(method)
        started = time.perf_counter()
        examples = [as_request(example) for example in examples]
        pieces, prompts = self._read(examples, method, max_new_tokens)
        read_s = (time.perf_counter() - started) / max(1, len(examples))
        order = list(range(len(examples)))
        if method.history is None:  # what one prompt leaves behind serves the next
            order.sort(key=lambda index: len(prompts[index].ids))
        answers: list[Answer | None] = [None] * len(examples)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            self._warm_up([pieces[i] for i in batch], method)
            laid = [prompts[i] for i in batch]
            if method.history is not None:
                laid = [self.lay_out(pieces[i], method, max_new_tokens) for i in batch]
            run = prefill_batch(self._state, laid, [pieces[i] for i in batch], method)
            run.watch.add("prompt_s", read_s * len(batch))
            made = run.answers(sampling or Sampling(), max_new_tokens, streams=batch)
            for index, answer in zip(batch, made, strict=True):
                chunks = tuple(examples[index].chunks)
                answers[index] = dataclasses.replace(answer, chunks=chunks)
        return answers

    def stream(
        self,
        example: Request | Mapping[str, Any],
        method: str | Method = "naive",
        *,
        max_new_tokens: int = 32,
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """Yields an answer's text as it is made; the pieces join to `answer`'s text."""
        method = built(method)
        self._warm_up([self.prompts.pieces(example, method)], method)
        pieces, prompts = self._read([example], method, max_new_tokens)
        run = prefill_batch(self._state, prompts, pieces, method)
        ids: list[int] = []
        shown = ""
        for token in run.tokens(sampling or Sampling(), max_new_tokens):
            ids.append(int(token))
            text = self._state.text(ids)
            # A character may need several tokens; until then its bytes do not decode.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        if tail := self._state.text(ids)[len(shown) :]:
            yield tail

    def cache(
        self, chunks: Any, method: str | Method = "naive", question: str | None = None
    ) -> CachedContext:
        """The prompt up to its question as a cache that stock `generate` continues.

        Greedy decoding over it writes the tokens of `answer`.

        Args:
            chunks: Passages in prompt order, in any form that `RagExample.chunks` takes.
            method: Any method without a reshape.
            question: For methods that choose tokens by it; without one the cache serves any.

        Raises:
            ValueError: If the method reshapes attention or needs a question, or as `answer` does.
        """
        method = built(method)
        if self._state.recurrence is not None:
            raise ValueError(REUSE_REFUSED.format("a cache of the context"))
        context_cache.require_cacheable(method, self._state.num_layers, question)
        chunks = read_chunks(chunks)

        def pieces(asked: str) -> Pieces:
            return self.prompts.pieces(RagExample(asked, chunks), method)

        def lay_out(asked: str) -> Prompt:
            return self.prompts.prompt(pieces(asked), self.prompts.spec(method))

        prompt = pieces("?" if question is None else question)
        self._warm_up([prompt], method)
        stops, pad_id = sorted(self._state.stop_ids()), self._state.pad_id
        decoding = {"eos_token_id": stops, "pad_token_id": pad_id}
        run = self.start([prompt], method)
        return context_cache.cut_context(run, question, lay_out, decoding)

    def start(self, pieces: Sequence[Pieces], method: str | Method) -> Generation:
        """Serves prompts given as token pieces up to their first logits."""
        method = built(method)
        return prefill_batch(self._state, [self.lay_out(p, method) for p in pieces], pieces, method)

    def prefilled(self, examples: Sequence[Request], method: str | Method) -> Generation:
        """Like `start`, of examples."""
        method = built(method)
        return self.start([self.prompts.pieces(example, method) for example in examples], method)

    def next_logits(self, examples: Sequence[Request], method: str | Method) -> torch.Tensor:
        """Logits of the first answer token, ``(B, V)``: what equivalence is checked on."""
        return self.prefilled(examples, method).prefill.logits

    def continued_logits(
        self, example: Request, method: str | Method, num_tokens: int
    ) -> tuple[tuple[int, ...], torch.Tensor]:
        """Decodes ``num_tokens`` greedily; their ids, and the logits ``(1, V)`` after them."""
        method = built(method)
        pieces, prompts = self._read([example], method, num_tokens + 1)
        return prefill_batch(self._state, prompts, pieces, method).continued(num_tokens)

    def lay_out(self, pieces: Pieces, method: Method, max_new_tokens: int = 0) -> Prompt:
        """The rows of a prompt as ``method`` serves it now, by what earlier prompts left behind.

        Raises:
            ValueError: If the method does not fit the model's adapter, or the prompt its context.
        """
        spec = self.prompts.spec(method)
        if method.history is None:
            return self.prompts.prompt(pieces, spec, max_new_tokens)
        encoder = self._state.encoder
        contexts = method.history.lookup(encoder.store, encoder.fingerprint, pieces)
        spec = LayoutSpec(block=False) if contexts is None else spec
        return self.prompts.prompt(pieces, spec, max_new_tokens, contexts)

    def _read(
        self, examples: Sequence[Request], method: Method, max_new_tokens: int = 1
    ) -> tuple[list[Pieces], list[Prompt]]:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        pieces = [self.prompts.pieces(example, method) for example in examples]
        return pieces, [self.lay_out(piece, method, max_new_tokens) for piece in pieces]

    def _warm_up(self, pieces: Sequence[Pieces], method: Method) -> None:
        """Serves the earlier prompts that the method wants behind it, each in full."""
        for by in range(1, method.warm_up + 1):
            turned = [(one.chunks, by % max(1, len(one.chunks))) for one in pieces]
            chunks = [chunks[start:] + chunks[:start] for chunks, start in turned]
            earlier = [p._replace(chunks=c) for p, c in zip(pieces, chunks, strict=True)]
            laid = [self.prompts.prompt(one, LayoutSpec(block=False), 1) for one in earlier]
            next(prefill_batch(self._state, laid, earlier, method).tokens(Sampling(), 1))


def built(method: str | Method) -> Method:
    """A method by its name, or the method itself."""
    return build(method) if isinstance(method, str) else method


def _document(chunk: Chunk) -> str:
    names = (chunk.metadata.get("document"), chunk.metadata.get("id"), chunk.title)
    return str(next((name for name in names if name is not None), ""))
