"""The engine: answers questions from chunk caches by any reuse method, on stock models."""

from __future__ import annotations

import copy
import dataclasses
import logging
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
from blocktune.cache.responses import ResponseCache
from blocktune.cache.store.fingerprint import manifest
from blocktune.data.example import read_chunks
from blocktune.engine.batch_prefill import prefill_batch, prefill_warm
from blocktune.engine.context_cache import CachedContext, make_context
from blocktune.engine.encode import Encoder, EncodeReport
from blocktune.engine.generation import Answer, Generation, Sampling, TextStream
from blocktune.engine.layer_schedule import hook
from blocktune.engine.prompts import PromptMaker, Request, as_request, as_requests, built
from blocktune.engine.recall import Recall
from blocktune.engine.state import Auxiliaries, EngineState, unfollowed
from blocktune.links import link_base
from blocktune.methods import Method
from blocktune.methods.press import Press
from blocktune.models.gate import context_length
from blocktune.positions import load_fused
from blocktune.prompt import Pieces, Prompt, PromptFormat
from blocktune.prompt.special_tokens import padding_id
from blocktune.registry import require_count

_LOG = logging.getLogger(__name__)


class Engine:
    """Answers questions over chunks by any reuse method.

    ```python
    engine = Engine.from_pretrained("data/tiny", adapter="out/block_attention")
    answer = engine.answer([example], method="block-attention")[0]
    print(answer.text, answer.usage.recompute_ratio, answer.usage.ttft_s)
    ```

    Several threads may answer at once: requests share only the caches, which are locked.
    """

    responses: ResponseCache | None = None  # set it to cache whole answers

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
        """Serves a loaded model, whose attention is replaced by blocktune's.

        Changes of the model's weights are refused later, but not those through ``weight.data``.

        Args:
            model: A RoPE decoder, with its adapter attached or merged; or one with recurrent layers
                or absolute positions, which supports only methods that reuse no chunk.
            tokenizer: The model's tokenizer.
            format: Wording of prompts; default: the adapter's, else `PromptFormat`'s.
            adapter: What the model's adapter was trained for, if it has one.
            adapter_folder: The adapter's files.
            store: Where encoded chunks are kept; default: memory.
            prefix_tree: Where exact prefixes are kept; default: memory, then the store's folder.

        Raises ValueError if cached chunks of the model cannot be moved, or ``adapter`` is wrong.
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
        press = None if self.store.config.press is None else Press(self.store.config.press)
        pad_id = padding_id(tokenizer, num_tokens)
        encoder = Encoder(model, self.store, self.fingerprint, pad_id, rope, press)
        if rope is not None:
            facts = model, tokenizer, words, adapter, adapter_folder, rope
            self.store.write_manifest(
                self.fingerprint, lambda: manifest(*facts, encoder.sample()), rope
            )
        if press is not None:  # engines without the press must not find pruned chunks
            encoder = encoder.salted(press.text, what="press")
            encoder.tenant, self.fingerprint = "", encoder.fingerprint
        tree, others = prefix_tree or PrefixTree(store=self.store), Auxiliaries(model, tokenizer)
        self.state = EngineState(model, tokenizer, encoder, tree, others, recurrence)
        for name in unfollowed(model.generation_config):
            value = getattr(model.generation_config, name)
            _LOG.warning("the model's generation config has %s=%s: not followed", name, value)
        self.prompts = PromptMaker(
            tokenizer,
            self.format,
            trained=adapter.layout if adapter else None,
            link_base=adapter.link_base(model, tokenizer) if adapter else None,
            max_tokens=context_length(model.config.get_text_config()),
            num_layers=self.state.num_layers,
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

        ``store`` is a `ChunkStore`, or any text that `ChunkStore.open` takes, such as a folder;
        None: memory only. For the other options see `Engine` and `load_model`. Raises ValueError
        if the model or adapter does not exist, or they do not match.
        """
        how = {"dtype": dtype, "device": device, "revision": revision, "quantize": quantize}
        base, tokenizer, info, folder = load_model(model, adapter, recurrent=recurrent, **how)
        if isinstance(store, str | Path):
            store = ChunkStore.open(store, device=base.device)
        return cls(base, tokenizer, format=format, adapter=info, adapter_folder=folder, store=store)

    def encode(
        self,
        chunks: Any,
        progress: Callable[[int, int], None] | None = None,
        method: str | Method | None = None,
    ) -> EncodeReport:
        """Encodes chunks (and the prefix of all prompts) into the store ahead of any request.

        ``chunks`` may have any form that `RagExample.chunks` takes. Each is stored with the name of
        its document (``document`` or ``id`` of its metadata, else its title), by which `blocktune
        store rm --document` removes it. ``progress`` is called after each pass with the tokens
        done and their total. ``method`` will read them: only one of another layout (``link0``) or
        with stored hidden states (``droidspeak``) needs other entries. Raises ValueError for one
        that takes chunks from prompts it has served.
        """
        chunks, method = read_chunks(chunks), built(method, self.prompts.trained)
        pieces = self.prompts.encodable(chunks, method)
        return self.state.encoder.encode(*pieces, chunks, self.state.inputs_of(method), progress)

    def encode_wanted(self, most: int = 256) -> int:
        """Encodes up to ``most`` queued chunks. Returns their number. ValueError: no folder."""
        if self.store.folder is None:
            raise ValueError("missed chunks are queued in a folder; use a store with a folder")
        return self.state.encoder.encode_wanted(most, self.prompts.longest)

    def add_auxiliary(
        self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        """Registers a loaded model under a name that selectors (``cacheclip``) can refer to.

        Raises ValueError if the tokenizer is not the served one.
        """
        self.state.auxiliaries.add(name, model, tokenizer)

    def forget(self) -> None:
        """Drops all chunks and exact prefixes from memory, so that the next answer finds none."""
        self.store.clear()
        self.forget_prefixes()

    def reworded(self, format: PromptFormat) -> Engine:
        """An engine with the same model and caches and another wording of prompts."""
        other = copy.copy(self)
        other.format, other.prompts = format, dataclasses.replace(self.prompts, format=format)
        return other

    def salted(self, salt: str, tenant: str = "") -> Engine:
        """An engine whose chunks and prefixes are visible only to engines of the same salt.

        An empty salt changes nothing. Chunks count against the store's quota of the ``tenant``;
        default: one for each salt.
        """
        if not salt:
            return self
        other, encoder = copy.copy(self), self.state.encoder.salted(salt, tenant)
        other.fingerprint = encoder.fingerprint
        other.state = dataclasses.replace(self.state, encoder=encoder)
        self.state.prefix_tree.charge(other.fingerprint, encoder.tenant)
        return other

    def decoding_on(self, text: str) -> Engine:
        """An engine with the same model and caches that decodes on a `DecodeCache`, from its text.

        Raises ValueError if the text is wrong, or the model has its own kind of cache.
        """
        if self.state.recurrence is not None:
            raise ValueError("this model decodes on its own cache; leave the decode cache out")
        other = copy.copy(self)
        other.state = dataclasses.replace(self.state, decode_cache=DecodeCache.parse(text))
        return other

    def forget_prefixes(self) -> None:
        """Empties the exact prefix cache, so that the next prompt finds no prefix."""
        self.state.prefix_tree.clear()

    def answer(
        self,
        examples: Sequence[Request | Mapping[str, Any]],
        method: str | Method | None = None,
        *,
        max_new_tokens: int = 32,
        sampling: Sampling | Mapping[str, Any] | None = None,
        batch_size: int = 8,
    ) -> list[Answer]:
        """Answers examples by a method, in batches of prompts of similar length.

        Args:
            examples: `RagExample`, or rows of a data set such as ``{"question": ..., "chunks":
                [...]}``, with chunks in any form `RagExample` takes.
            method: Name or a built `Method`; None: what the adapter was trained for, else naive.
            max_new_tokens: Most tokens to decode.
            sampling: How tokens are picked, or a mapping of its fields; default greedy.
            batch_size: Number of prompts served together.

        Returns an answer for each example, with its chunks, in their order. Raises ValueError if
        the method is unknown or does not match the model's adapter, or a prompt does not fit into
        the model's context.
        """
        require_count("batch_size", batch_size, least=1)
        require_count("max_new_tokens", max_new_tokens, least=1)
        method, sampling = built(method, self.prompts.trained), Sampling.of(sampling)
        started = time.perf_counter()
        examples = as_requests(examples)
        pieces, spec = [self.prompts.pieces(x, method) for x in examples], self.prompts.spec(method)
        # Laid out as without a history, which only the served prompt may look up.
        prompts = [self.prompts.prompt(piece, spec, max_new_tokens) for piece in pieces]
        read_s = (time.perf_counter() - started) / max(1, len(examples))
        how = self.responses, self.state, method, sampling, max_new_tokens
        asked = enumerate(zip(pieces, examples, strict=True))
        recalls = [Recall.of(*how, ids, example.question, i) for i, (ids, example) in asked]
        answers = [recall and recall.answer() for recall in recalls]
        order = [index for index, cached in enumerate(answers) if cached is None]
        if method.history is None:  # with a history, each prompt affects the next: keep the order
            order.sort(key=lambda index: len(prompts[index].input_ids))
        decode_cache = self.state.decode_cache
        batch_size = 1 if decode_cache is not None and decode_cache.window else batch_size
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            ready = None if method.history is not None else [prompts[i] for i in batch]
            own = [pieces[i] for i in batch]
            generation = prefill_warm(self.state, self.prompts, own, method, max_new_tokens, ready)
            generation.watch.add("prompt_s", read_s * len(batch))
            batch_answers = generation.answers(sampling, max_new_tokens, streams=batch)
            for index, answer in zip(batch, batch_answers, strict=True):
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
        sampling: Sampling | Mapping[str, Any] | None = None,
    ) -> Iterator[str]:
        """Yields an answer's text as it is decoded. The pieces join to the text of `answer`."""
        require_count("max_new_tokens", max_new_tokens, least=1)
        method, example = built(method, self.prompts.trained), as_request(example)
        pieces, sampling = self.prompts.pieces(example, method), Sampling.of(sampling)
        how = self.responses, self.state, method, sampling, max_new_tokens
        recall = Recall.of(*how, pieces, example.question)
        if recall is not None and (cached := recall.answer()) is not None:
            yield cached.text
            return
        generation = prefill_warm(self.state, self.prompts, [pieces], method, max_new_tokens)
        text, ids = TextStream(self.tokenizer), []
        for token in generation.tokens(sampling, max_new_tokens):
            ids.append(int(token))
            yield text.push(ids[-1])
        yield text.finish()
        if recall is not None:
            recall.keep(TextStream(self.tokenizer).whole(ids), ids)

    def cache(
        self, chunks: Any, method: str | Method | None = None, question: str | None = None
    ) -> CachedContext:
        """Caches the prompt up to its question, for stock `generate` to continue from.

        Greedy decoding from it gives the tokens of `answer`. Methods that select tokens by the
        ``question`` need it; without one, the cache is valid for any question. Raises ValueError if
        the method reshapes attention or needs a question, or as `answer` does.
        """
        chunks, method = read_chunks(chunks), built(method, self.prompts.trained)
        return make_context(self.state, self.prompts, chunks, method, question)

    def start(self, pieces: Sequence[Pieces], method: str | Method) -> Generation:
        """Prefills prompts given as token pieces, up to their first logits."""
        method = built(method)
        prompts = [self.lay_out(prompt_pieces, method) for prompt_pieces in pieces]
        return prefill_batch(self.state, prompts, pieces, method)

    def prefilled(self, examples: Sequence[Request], method: str | Method) -> Generation:
        """Like `start`, for examples."""
        method = built(method)
        return self.start([self.prompts.pieces(example, method) for example in examples], method)

    def next_logits(self, examples: Sequence[Request], method: str | Method) -> torch.Tensor:
        """Logits of the first answer token, ``(B, V)``, e.g. to check equivalence of methods."""
        return self.prefilled(examples, method).prefill.logits

    def continued_logits(
        self, example: Request, method: str | Method, num_tokens: int
    ) -> tuple[tuple[int, ...], torch.Tensor]:
        """Decodes ``num_tokens`` greedily. Returns their ids and the next logits, ``(1, V)``."""
        return self.prefilled([example], method).continued(num_tokens)

    def lay_out(self, pieces: Pieces, method: Method, max_new_tokens: int = 0) -> Prompt:
        """Lays out a prompt's rows for ``method``, given its history. Raises as `answer` does."""
        return self.prompts.lay_out(pieces, method, self.state.encoder, max_new_tokens)
