"""The engine: answers from chunk caches by any method, on stock models."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.adapter import AdapterInfo
from blocktune.adapter.load import load_model
from blocktune.cache import ChunkStore, PrefixTree, model_fingerprint
from blocktune.cache.decode_cache import DecodeCache
from blocktune.cache.fingerprint import manifest
from blocktune.cache.responses import ResponseCache
from blocktune.data.example import read_chunks
from blocktune.engine.batch_prefill import prefill_batch, warm_up
from blocktune.engine.context_cache import CachedContext, make_context
from blocktune.engine.encode import Encoder, EncodeReport
from blocktune.engine.generation import Answer, Generation, Sampling
from blocktune.engine.layer_schedule import hook
from blocktune.engine.prompts import PromptMaker, Request, as_request, built
from blocktune.engine.recall import Recall
from blocktune.engine.state import Auxiliaries, EngineState
from blocktune.links import link_base
from blocktune.methods import Method
from blocktune.methods.press import Press
from blocktune.positions import load_fused
from blocktune.prompt import Pieces, Prompt, PromptFormat
from blocktune.prompt.special_tokens import padding_id
from blocktune.registry import require_count

NO_LIMIT = 1 << 30
"""Tokens of a context where the model's configuration names no limit."""


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

    responses: ResponseCache | None = None  # set it to keep whole answers

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
            model: A RoPE decoder, with its adapter attached or merged; or one with recurrent layers
                (Mamba-2, Qwen3-Next, ...) or absolute positions (GPT-2), which serves only methods
                that reuse no chunk.
            tokenizer: The model's.
            format: Wording of prompts; default: the adapter's, else `PromptFormat`'s.
            adapter: What the model's adapter was trained for, if it has one.
            adapter_folder: Its files, which count in the cache's fingerprint.
            store: Where encoded chunks are kept; default: memory.
            prefix_tree: Where exact prefixes are kept; default: memory, then the store's folder.

        Raises:
            ValueError: If cached chunks of the model cannot be moved, or it has another adapter.
        """
        rope, recurrence = hook(model)
        if rope is not None and model.device.type == "cpu":
            load_fused()
        self.model, self.tokenizer, self.adapter = model.eval(), tokenizer, adapter
        self.format = format or (adapter.format if adapter else PromptFormat())
        if adapter:
            adapter.require_served(model, self.format)
        self.store = ChunkStore(device=model.device) if store is None else store
        words, num_tokens = dataclasses.asdict(self.format), link_base(model)
        self.fingerprint = model_fingerprint(model, adapter_folder, tokenizer, words)
        pad_id = padding_id(tokenizer, num_tokens)
        press = None if self.store.config.press is None else Press(self.store.config.press)
        encoder = Encoder(model, self.store, self.fingerprint, pad_id, rope, press)
        if rope is not None:
            facts = model, tokenizer, words, adapter, adapter_folder, rope
            self.store.describe(self.fingerprint, lambda: manifest(*facts, encoder.sample()), rope)
        if press is not None:  # thinned chunks are no other engine's
            encoder = encoder.salted(press.text, "press")
            encoder.tenant, self.fingerprint = "", encoder.fingerprint
        tree = PrefixTree(store=self.store) if prefix_tree is None else prefix_tree
        caches, auxiliaries = (encoder, tree, rope, pad_id), Auxiliaries(model, tokenizer)
        self.state = EngineState(model, tokenizer, *caches, auxiliaries, recurrence)
        config = model.config.get_text_config()
        self.prompts = PromptMaker(
            tokenizer,
            self.format,
            trained=adapter.layout if adapter else None,
            link_base=adapter.link_base(model, tokenizer) if adapter else None,
            max_tokens=getattr(config, "max_position_embeddings", NO_LIMIT),  # Mamba has none
            num_layers=config.num_hidden_layers,
            refusal=recurrence and recurrence.refusal,
            num_tokens=num_tokens,
            exact_tokens=rope.max_tokens if rope else None,
            press=press,
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
        recurrent: bool = True,
    ) -> Engine:
        """Loads a model (and an adapter trained by blocktune) from a folder or the HF Hub.

        Options that are not named here are those of `blocktune.adapter.load.load_model`. ``store``
        says where encoded chunks are kept: a `ChunkStore`, or any text that `ChunkStore.open`
        takes, such as a folder; None: memory only. ``format`` is the wording of prompts; None: the
        adapter's.

        Raises:
            ValueError: If there is no such model or adapter, or they do not fit.
        """
        options = {"dtype": dtype, "device": device, "revision": revision, "quantize": quantize}
        options |= {"recurrent": recurrent}
        base, tokenizer, info, folder = load_model(model, adapter, **options)
        if isinstance(store, str | Path):
            store = ChunkStore.open(store, device=base.device)
        return cls(base, tokenizer, format=format, adapter=info, adapter_folder=folder, store=store)

    def encode(
        self, chunks: Any, progress: Callable[[int, int], None] | None = None
    ) -> EncodeReport:
        """Encodes chunks (and the prefix of all prompts) into the store ahead of any request.

        Each, in any form that `RagExample.chunks` takes, is kept under the name of its document:
        ``document`` or ``id`` of its metadata, else its title; `blocktune store rm --document`
        removes by it. ``progress`` is called with tokens done and in all after each pass.
        """
        chunks = read_chunks(chunks)
        pieces = self.prompts.encodable(chunks)
        return self.state.encoder.encode(*pieces, chunks, progress)

    def encode_wanted(self, most: int = 256) -> int:
        """Encodes up to ``most`` chunks that readers of the store missed; returns how many it was.

        See `MissQueue`. Raises ValueError if the store has no folder.
        """
        if self.store.folder is None:
            raise ValueError("chunks are wanted in a folder; give the engine a store with one")
        return self.state.encoder.encode_wanted(most, self.prompts.max_tokens)

    def add_auxiliary(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Gives a loaded model a name by which selectors may ask it (``cacheclip``).

        Folders need no name. Raises ValueError if its tokenizer is not the served model's.
        """
        self.state.auxiliaries.add(name, model, tokenizer)

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

        The salt goes into the fingerprint, and so into every key; an empty one changes nothing.
        """
        if not salt:
            return self
        other, encoder = copy.copy(self), self.state.encoder.salted(salt)
        other.fingerprint = encoder.fingerprint
        other.state = dataclasses.replace(self.state, encoder=encoder)
        return other

    def decoding_on(self, text: str) -> Engine:
        """The same model and caches; answers are decoded on the kind of cache that ``text`` names.

        See `blocktune.cache.decode_cache.DecodeCache`. Raises ValueError as that does, or if the
        model decodes on a cache of its own.
        """
        if self.state.recurrence is not None:
            raise ValueError("this model decodes on its own cache; leave the decode cache out")
        other = copy.copy(self)
        other.state = dataclasses.replace(self.state, decode_cache=DecodeCache.parse(text))
        return other

    def forget_prefixes(self) -> None:
        """Empties the exact prefix cache: the next prompt finds nothing of those before it."""
        self.state.prefix_tree.clear()

    def answer(
        self,
        examples: Sequence[Request | Mapping[str, Any]],
        method: str | Method | None = None,
        *,
        max_new_tokens: int = 32,
        sampling: Sampling | None = None,
        batch_size: int = 8,
    ) -> list[Answer]:
        """Answers examples by a method, in batches of prompts of similar length.

        Args:
            examples: Questions with their chunks: `RagExample`, or rows of a data set such as
                ``{"question": ..., "chunks": [...]}``, with chunks in any form it takes.
            method: Name or a built `Method`; None: what the adapter was trained for, else naive.
            max_new_tokens: Tokens to decode at most.
            sampling: How tokens are picked; default greedy.
            batch_size: Prompts served together.

        Returns one answer per example, in their order, with the chunks as they were read. Raises
        ValueError if the method is unknown or does not fit the model's adapter, or a prompt does
        not fit the model's context.
        """
        require_count("batch_size", batch_size, least=1)
        method, sampling = built(method, self.prompts.trained), sampling or Sampling()
        started = time.perf_counter()
        examples = [as_request(example) for example in examples]
        pieces, prompts = self._read(examples, method, max_new_tokens)
        read_s = (time.perf_counter() - started) / max(1, len(examples))
        asked = zip(range(len(pieces)), pieces, [e.question for e in examples], strict=True)
        how = self.responses, self.state, method, (sampling, max_new_tokens)
        recalls = [Recall.of(*how, one) for one in asked]
        answers = [one and one.answer() for one in recalls]
        order = [index for index, known in enumerate(answers) if known is None]
        if method.history is None:  # what one prompt leaves behind serves the next
            order.sort(key=lambda index: len(prompts[index].input_ids))
        held = self.state.decode_cache
        batch_size = 1 if held is not None and held.window else batch_size
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            warm_up(self.state, self.prompts, [pieces[i] for i in batch], method)
            laid = [prompts[i] for i in batch]
            if method.history is not None:
                laid = [self.lay_out(pieces[i], method, max_new_tokens) for i in batch]
            run = prefill_batch(self.state, laid, [pieces[i] for i in batch], method)
            run.watch.add("prompt_s", read_s * len(batch))
            made = run.answers(sampling, max_new_tokens, streams=batch)
            for index, answer in zip(batch, made, strict=True):
                answers[index] = answer
                if (recall := recalls[index]) is not None:
                    recall.keep(answer.text, answer.token_ids, answer.usage.ttft_s)
        return [
            dataclasses.replace(answer, chunks=tuple(example.chunks))
            for answer, example in zip(answers, examples, strict=True)
        ]

    def stream(
        self,
        example: Request | Mapping[str, Any],
        method: str | Method | None = None,
        *,
        max_new_tokens: int = 32,
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """Yields an answer's text as it is made; the pieces join to `answer`'s text."""
        method, example = built(method, self.prompts.trained), as_request(example)
        sampling = sampling or Sampling()
        asked = 0, self.prompts.pieces(example, method), example.question
        how = self.responses, self.state, method, (sampling, max_new_tokens)
        recall = Recall.of(*how, asked)
        if recall is not None and (known := recall.answer()) is not None:
            yield known.text
            return
        warm_up(self.state, self.prompts, [asked[1]], method)
        pieces, prompts = self._read([example], method, max_new_tokens)
        run = prefill_batch(self.state, prompts, pieces, method)
        ids: list[int] = []
        yield from run.texts(sampling, max_new_tokens, ids)
        if recall is not None:
            recall.keep(self.state.text(ids), ids)

    def cache(
        self, chunks: Any, method: str | Method | None = None, question: str | None = None
    ) -> CachedContext:
        """The prompt up to its question as a cache that stock `generate` continues.

        Greedy decoding over it writes the tokens of `answer`. ``chunks`` are passages in prompt
        order, in any form that `RagExample.chunks` takes; ``question`` is for methods that choose
        tokens by it: without one the cache serves any. Raises ValueError if the method reshapes
        attention or needs a question, or as `answer` does.
        """
        chunks, made = read_chunks(chunks), built(method, self.prompts.trained)
        return make_context(self.state, self.prompts, chunks, made, question)

    def start(self, pieces: Sequence[Pieces], method: str | Method) -> Generation:
        """Serves prompts given as token pieces up to their first logits."""
        method = built(method)
        laid = [self.lay_out(one, method) for one in pieces]
        return prefill_batch(self.state, laid, pieces, method)

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
        return prefill_batch(self.state, prompts, pieces, method).continued(num_tokens)

    def lay_out(self, pieces: Pieces, method: Method, max_new_tokens: int = 0) -> Prompt:
        """The rows of a prompt as ``method`` serves it now, by what earlier prompts left behind.

        Raises ValueError if the method does not fit the adapter, or the prompt the model's context.
        """
        return self.prompts.lay_out(pieces, method, self.state.encoder, max_new_tokens)

    def _read(
        self, examples: Sequence[Request], method: Method, max_new_tokens: int = 1
    ) -> tuple[list[Pieces], list[Prompt]]:
        require_count("max_new_tokens", max_new_tokens, least=1)
        pieces = [self.prompts.pieces(example, method) for example in examples]
        return pieces, [self.lay_out(piece, method, max_new_tokens) for piece in pieces]
