"""The engine: answers from chunk caches by any method, on stock models."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.adapter import AdapterInfo
from blocktune.attention import attach
from blocktune.cache import ChunkStore, PrefixTree, RowCache, cut_exact, model_fingerprint
from blocktune.data.example import RagExample
from blocktune.engine.account import Account, Stopwatch, Ttft
from blocktune.engine.assemble import Assembled, from_chunks, from_prefix
from blocktune.engine.decode import Sampling, decode
from blocktune.engine.encode import Encoder, Piece
from blocktune.engine.load import load_model
from blocktune.engine.prefill import Prefill, prefill
from blocktune.engine.rows import column_rows, computed_rows
from blocktune.layout import Rows
from blocktune.positions import RopeSpec
from blocktune.prompt import (
    Batch,
    Chunk,
    LayoutSpec,
    Pieces,
    Prompt,
    PromptFormat,
    chunk_ids,
    end_of_turn,
    lay_out,
    make_pieces,
    prefix_ids,
    stack,
)
from blocktune.reuse import Cached, Method, build


@dataclass(frozen=True)
class Answer:
    """An answer and what it cost.

    Attributes:
        text: Decoded, without the end of turn.
        token_ids: As generated, the end of turn included.
        account: The cost.
    """

    text: str
    token_ids: tuple[int, ...]
    account: Account


class EncodeReport(NamedTuple):
    """What `Engine.encode` did: chunks given, newly encoded, tokens and seconds of those."""

    num_chunks: int
    num_encoded: int
    num_tokens: int
    encode_s: float


@dataclass
class _Run:
    """One batch after its prefill."""

    prefill: Prefill
    assembled: Assembled
    cache: RowCache
    columns: Rows
    last: Rows
    batch: Batch
    watch: Stopwatch


class Engine:
    """Answers questions over chunks by any reuse method.

    ```python
    engine = Engine.from_pretrained("data/tiny", adapter="out/block_attention")
    answer = engine.answer([example], method="block-attention")[0]
    print(answer.text, answer.account.recompute_ratio, answer.account.ttft_s)
    ```
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
            model: A RoPE decoder, with its adapter attached or merged.
            tokenizer: The model's.
            format: Wording of prompts; default: the adapter's, else `PromptFormat`'s.
            adapter: What the model's adapter was trained for, if it has one.
            adapter_folder: Where its files are: they count in the cache's fingerprint.
            store: Where encoded chunks are kept; default: memory.
            prefix_tree: Where exact prefixes are kept; default: memory.

        Raises:
            ValueError: If the model cannot be served from moved chunk caches, or ``format``
                differs from what the adapter was trained with.
        """
        self.rope = RopeSpec.from_model(model)
        attach(model)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.adapter = adapter
        self.format = format or (adapter.format if adapter else PromptFormat())
        if adapter and self.format != adapter.format:
            raise ValueError(
                f"the adapter was trained with the prompt format {adapter.format}, got "
                f"{self.format}; leave the format out to use the adapter's"
            )
        self.store = store or ChunkStore(device=model.device)
        self.prefix_tree = prefix_tree or PrefixTree()
        words = dataclasses.asdict(self.format)
        self.fingerprint = model_fingerprint(model, adapter_folder, tokenizer, words)
        self._pad_id = _pad_id(tokenizer)
        self._encoder = Encoder(model, self.store, self.fingerprint, self._pad_id)
        self._link_base = adapter.link_base(model, tokenizer) if adapter else None
        config = model.config.get_text_config()
        self.num_layers, self.max_tokens = config.num_hidden_layers, config.max_position_embeddings

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        adapter: str | Path | None = None,
        *,
        store: str | Path | ChunkStore | None = None,
        dtype: str = "auto",
        device: str | None = None,
        revision: str | None = None,
        format: PromptFormat | None = None,
    ) -> Engine:
        """Loads a model (and an adapter trained by blocktune) from a folder or the HF Hub.

        Args:
            model: Folder or repository name.
            adapter: Folder or repository name of an adapter, or None.
            store: Folder to keep encoded chunks in (or a store); None: memory only.
            dtype: As `from_pretrained` of transformers takes it.
            device: Such as ``cuda:0``; default: CUDA if there is one.
            revision: Of the model's repository.
            format: Wording of prompts; default: the adapter's.

        Raises:
            ValueError: If there is no such model or adapter, or they do not fit.
        """
        loaded = load_model(model, adapter, dtype=dtype, device=device, revision=revision)
        if isinstance(store, str | Path):
            store = ChunkStore(folder=store, device=loaded.model.device)
        return cls(
            loaded.model,
            loaded.tokenizer,
            format=format,
            adapter=loaded.info,
            adapter_folder=loaded.folder,
            store=store,
        )

    def encode(self, chunks: Sequence[Chunk]) -> EncodeReport:
        """Encodes chunks (and the prefix of all prompts) into the store ahead of any request."""
        watch = Stopwatch(self.model.device)
        spec = self.adapter.layout if self.adapter else LayoutSpec()
        prefix = prefix_ids(self.tokenizer, self.format)
        ghosts = self._ghosts(spec, prefix)
        pieces = [Piece(prefix)] if prefix else []
        for chunk in chunks:
            ids = chunk_ids(self.tokenizer, self.format, chunk)
            self._require_length(len(ids), f"chunk {chunk.title or chunk.text!r:.40}")
            pieces.append(Piece(ids, ghosts))
        found = self._encoder.find(pieces, watch)
        new = [piece for piece in found.misses if piece.ids != prefix]
        tokens = sum(len(piece.ids) for piece in new)
        return EncodeReport(len(chunks), len(new), tokens, watch.seconds["encode_s"])

    def answer(
        self,
        examples: Sequence[RagExample],
        method: str | Method = "naive",
        *,
        max_new_tokens: int = 32,
        sampling: Sampling | None = None,
        batch_size: int = 8,
    ) -> list[Answer]:
        """Answers examples by a method, in batches of prompts of similar length.

        Args:
            examples: Questions with their chunks.
            method: Name or a built `Method`.
            max_new_tokens: Tokens to decode at most.
            sampling: How tokens are picked; default greedy.
            batch_size: Prompts served together.

        Returns:
            One answer per example, in their order.

        Raises:
            ValueError: If the method is unknown or does not fit the model's adapter, or a prompt
                does not fit the model's context.
        """
        method = build(method) if isinstance(method, str) else method
        spec = method.layout(self.adapter.layout if self.adapter else None)
        pieces = [self.pieces(example, method) for example in examples]
        prompts = [self._lay_out(piece, spec, max_new_tokens) for piece in pieces]
        order = sorted(range(len(examples)), key=lambda index: len(prompts[index].ids))
        answers: list[Answer | None] = [None] * len(examples)
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            run = self._prefill([prompts[i] for i in batch], [pieces[i] for i in batch], method)
            tokens = list(self._decode(run, sampling or Sampling(), max_new_tokens))
            for index, answer in zip(batch, self._finish(run, tokens), strict=True):
                answers[index] = answer
        return answers

    def stream(
        self,
        example: RagExample,
        method: str | Method = "naive",
        *,
        max_new_tokens: int = 32,
        sampling: Sampling | None = None,
    ) -> Iterator[str]:
        """Yields an answer's text as it is made; the pieces join to `answer`'s text."""
        method = build(method) if isinstance(method, str) else method
        spec = method.layout(self.adapter.layout if self.adapter else None)
        pieces = self.pieces(example, method)
        run = self._prefill([self._lay_out(pieces, spec, max_new_tokens)], [pieces], method)
        ids: list[int] = []
        shown = ""
        for token in self._decode(run, sampling or Sampling(), max_new_tokens):
            ids.append(int(token))
            text = self._text(ids)
            # A character may need several tokens; until then its bytes do not decode.
            if not text.endswith("\ufffd"):
                yield text[len(shown) :]
                shown = text
        if tail := self._text(ids)[len(shown) :]:
            yield tail

    def next_logits(
        self, examples: Sequence[RagExample], method: str | Method = "naive"
    ) -> torch.Tensor:
        """Logits of the first answer token, ``(B, V)``: what equivalence is checked on."""
        method = build(method) if isinstance(method, str) else method
        spec = method.layout(self.adapter.layout if self.adapter else None)
        pieces = [self.pieces(example, method) for example in examples]
        prompts = [self._lay_out(piece, spec, 1) for piece in pieces]
        return self._prefill(prompts, pieces, method).prefill.logits

    def pieces(self, example: RagExample, method: Method) -> Pieces:
        """Token pieces of an example as ``method`` reads it."""
        pieces = make_pieces(self.tokenizer, self.format, example.chunks, example.question)
        return pieces if method.keeps_context else pieces._replace(chunks=())

    def _lay_out(self, pieces: Pieces, spec: LayoutSpec, max_new_tokens: int) -> Prompt:
        ghost_id = self._blank() if spec.num_ghosts else None
        prompt = lay_out(pieces, spec, self._link_base, ghost_id)
        self._require_length(
            len(prompt.ids) + max_new_tokens, f"a prompt of {len(pieces.chunks)} chunks"
        )
        return prompt

    def _require_length(self, tokens: int, what: str) -> None:
        if tokens > self.max_tokens:
            raise ValueError(
                f"{what} needs {tokens} tokens, the model's context holds {self.max_tokens}; "
                "cut the chunks smaller or retrieve fewer"
            )

    def _ghosts(self, spec: LayoutSpec, prefix: tuple[int, ...]) -> tuple[int, ...]:
        return prefix if spec.shared_prefix else (self._blank(),) * spec.num_ghosts

    def _blank(self) -> int:
        return self.tokenizer(" ", add_special_tokens=False)["input_ids"][0]

    @torch.no_grad()
    def _prefill(self, prompts: list[Prompt], pieces: list[Pieces], method: Method) -> _Run:
        watch = Stopwatch(self.model.device)
        batch = stack(prompts, self._pad_id).to(self.model.device)
        columns = column_rows(batch.layout)
        shape = (self.num_layers, *columns.kind.shape)
        exact = method.cached is not Cached.CHUNKS
        cache = RowCache(*shape, spare=64, exact=exact)
        assembled = self._assemble(method, batch, pieces, cache, watch)
        layout, selection = batch.layout, method.selection()
        watch.start()
        fresh = selection.start(layout) & layout.is_context
        # Whatever sees everything is computed, unless an exact cache holds it.
        compute = (layout.is_global & ~layout.is_context) | fresh
        compute &= (
            ~assembled.cached | fresh if method.cached is Cached.CHUNKS else ~assembled.cached
        )
        watch.stop("select_s")
        computed = computed_rows(batch, compute)
        result = prefill(self.model, computed, columns, cache, selection, layout.is_context.sum(1))
        watch.stop("recompute_s")
        watch.move("recompute_s", "select_s", result.select_s)
        if method.cached is Cached.EXACT_PREFIX:
            self._remember(cache, pieces)
        last = computed.rows.map(lambda field: field[:, -1:])
        return _Run(result, assembled, cache, columns, last, batch, watch)

    def _assemble(self, method: Method, batch, pieces, cache, watch) -> Assembled:
        if method.cached is Cached.CHUNKS:
            return from_chunks(batch, pieces, cache, self._encoder, self.rope, watch)
        if method.cached is Cached.EXACT_PREFIX:
            return from_prefix(batch, pieces, cache, self.prefix_tree, self.fingerprint, watch)
        return Assembled.empty(batch)

    def _remember(self, cache: RowCache, pieces: list[Pieces]) -> None:
        for index, prompt in enumerate(pieces):
            path = [prompt.prefix, *prompt.chunks]
            self.prefix_tree.insert(cut_exact(cache, index, path, self.fingerprint))

    def _decode(self, run: _Run, sampling: Sampling, max_new_tokens: int):
        stops = frozenset({end_of_turn(self.tokenizer)[-1], *self._eos()})
        steps = decode(
            self.model,
            run.cache,
            run.columns,
            run.last,
            run.prefill.logits,
            sampling,
            max_new_tokens,
            stops,
        )
        run.watch.start()
        first = next(steps)
        run.watch.stop("first_token_s")
        yield first
        yield from steps

    def _eos(self) -> set[int]:
        eos = self.model.generation_config.eos_token_id
        ids = eos if isinstance(eos, list) else [eos]
        return {token for token in [*ids, self.tokenizer.eos_token_id] if token is not None}

    def _finish(self, run: _Run, tokens: list[torch.Tensor]) -> list[Answer]:
        ttft = Ttft(**run.watch.seconds)
        layer_tokens = run.prefill.layer_tokens(self.num_layers)
        context, total = run.batch.layout.is_context.sum(1), (run.columns.kind != 0).sum(1)
        answers = []
        for index, ids in enumerate(torch.stack(tokens, dim=1).tolist()):
            ids = tuple(token for token in ids if token >= 0)
            account = Account(
                prompt_tokens=int(total[index]),
                context_tokens=int(context[index]),
                layer_tokens=tuple(layer_tokens[index].tolist()),
                probed_tokens=int(run.prefill.probed[index]),
                bytes_read=run.assembled.bytes_read[index],
                chunk_hits=run.assembled.hits[index],
                chunk_misses=run.assembled.misses[index],
                answer_tokens=len(ids),
                ttft=ttft,
            )
            answers.append(Answer(self._text(ids), ids, account))
        return answers

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any real id does: pad rows are invisible."""
    return 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id
