"""Makes the prompt that a method reads from a request, and checks the limits of the model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedTokenizerBase

from blocktune.data.example import RagExample
from blocktune.engine.encode import NOT_AHEAD, Encoder, Piece
from blocktune.layout import Kind
from blocktune.methods import Method, ServedModel, build, default_method
from blocktune.methods.press import Press
from blocktune.prompt import Chunk, LayoutSpec, Pieces, Prompt, PromptFormat, encode
from blocktune.prompt.pieces import chunk_ids, make_pieces, prefix_ids
from blocktune.prompt.rows import lay_out, sink_ids, wrapped
from blocktune.prompt.special_tokens import require_embedded


@runtime_checkable
class Request(Protocol):
    """The attributes of an example that the engine needs; `blocktune.data.RagExample` has them."""

    @property
    def question(self) -> str:
        """The question."""

    @property
    def chunks(self) -> Sequence[Chunk]:
        """The retrieved chunks, in prompt order."""


class TooLong(ValueError):
    """A prompt or a chunk that does not fit into the model's context."""

    code = "context_length_exceeded"  # OpenAI's name for it


def as_request(example: Request | Mapping[str, Any]) -> Request:
    """Returns an example unchanged, or a row as a `RagExample`. ValueError names a wrong field."""
    example = RagExample.from_json(example) if isinstance(example, Mapping) else example
    if not isinstance(example, Request):
        raise ValueError(
            f"a question must be a dict with question and chunks, got {type(example).__name__} "
            f"'{example!s:.40}'; answer takes a list of them, stream takes one"
        )
    return example


def as_requests(examples: Iterable[Request | Mapping[str, Any]]) -> list[Request]:
    """Converts each example by `as_request`. Raises ValueError if it is a single one."""
    if isinstance(examples, str | Mapping | Request) or not isinstance(examples, Iterable):
        given = type(examples).__name__
        raise ValueError(f"answer takes a list of questions, got {given}; pass [question]")
    return [as_request(example) for example in examples]


def built(method: str | Method | None, trained: LayoutSpec | None = None) -> Method:
    """Builds a method from its name. None: the one an adapter of that layout was trained for."""
    result = default_method(trained) if method is None else method
    result = build(result) if isinstance(result, str) else result
    if not isinstance(result, Method):
        raise ValueError(f"method must be a name or a Method, got {type(method).__name__}")
    return result


@dataclass(frozen=True)
class PromptMaker:
    """Makes prompts for one model."""

    tokenizer: PreTrainedTokenizerBase  # of the model
    format: PromptFormat  # wording
    trained: LayoutSpec | None  # layout that the model's adapter was trained for, or None
    link_base: int | None  # id of link slot 0, or None without links
    max_tokens: int  # context length of the model
    num_layers: int  # decoder layers of the model
    num_tokens: int  # rows of the model's embedding, without those of a link table
    refusal: str | None = None  # error if chunks cannot be reused; ``{}`` is what wanted that
    exact_tokens: int | None = None  # length up to which reuse is exact, if less than the context
    press: Press | None = None  # drops keys of encoded chunks

    @property
    def longest(self) -> int:
        """Most tokens of a prompt with its answer."""
        return min(self.max_tokens, self.exact_tokens or self.max_tokens)

    def pieces(self, request: Request | Mapping[str, Any], method: Method) -> Pieces:
        """Token pieces of a request for ``method``. Raises as `spec`."""
        block, request = self.spec(method).block, as_request(request)
        pieces = make_pieces(
            self.tokenizer, self.format, request.chunks, request.question, block=block
        )
        return pieces if method.keeps_context else pieces._replace(chunks=())

    def spec(self, method: Method) -> LayoutSpec:
        """The layout for ``method``; ValueError if the model or its adapter does not suit it."""
        if self.refusal and method.reuses_chunks:
            raise ValueError(self.refusal.format(f"method '{method.name}'"))
        min_layers = method.select().min_layers
        if min_layers > self.num_layers:
            raise ValueError(
                f"method '{method.name}' needs a model of at least {min_layers} layers, got "
                f"{self.num_layers}; choose an earlier layer"
            )
        method.select_for(self.num_layers)  # raises for a budget that cannot be met
        layout = method.layout_for(self.trained)
        self._require_room(layout.num_blanks, f"the blanks of method '{method.name}'")
        if self.press is not None:
            self.press.require(method, layout)
        below_zero = layout.sinks or method.history is not None
        if self.exact_tokens is not None and layout.block and below_zero:
            raise ValueError(
                f"method '{method.name}' encodes chunks after other tokens, at positions below 0, "
                "where this model's scaling by position is not defined; use another method"
            )
        return layout

    def prompt(
        self,
        pieces: Pieces,
        spec: LayoutSpec,
        max_new_tokens: int = 0,
        contexts: Sequence[tuple[int, ...]] | None = None,
    ) -> Prompt:
        """Lays pieces out. For ``contexts`` see `blocktune.prompt.lay_out`.

        Raises ValueError if prompt and answer do not fit, or a token has no embedding.
        """
        require_embedded(self.tokenizer, self.num_tokens, *pieces.all)
        lengths, spans = [len(chunk) for chunk in pieces.chunks], None
        if self.press is not None and spec.block:
            cut = [self._cut(chunk) for chunk in pieces.chunks]
            contexts, spans = [dropped for _, dropped in cut], lengths
            pieces = pieces._replace(chunks=tuple(kept for kept, _ in cut))
        ids = self.link_base, self._blank_id(spec), self._bos_id(spec)
        prompt = lay_out(pieces, spec, *ids, contexts, spans)
        self._require_room(max(lengths, default=0), "the longest chunk")
        what = f"a prompt of {len(pieces.chunks)} chunks with {max_new_tokens} tokens to answer"
        self._require_room(self.longest - self.room(prompt) + max_new_tokens, what)
        return prompt

    def room(self, prompt: Prompt) -> int:
        """Most tokens of an answer to a prompt."""
        stored = int((prompt.layout.kind != Kind.BLANK).sum())
        reach = int(prompt.layout.position.max()) + 1  # reserved slots leave positions unused
        return self.longest - max(stored, reach)

    def lay_out(
        self, pieces: Pieces, method: Method, encoder: Encoder, max_new_tokens: int = 0
    ) -> Prompt:
        """See `Engine.lay_out`. The history is in the ``encoder``'s store."""
        spec = self.spec(method)
        if method.history is None:
            return self.prompt(pieces, spec, max_new_tokens)
        model = ServedModel(encoder.model.get_input_embeddings(), encoder.rope, self.max_tokens)
        contexts = method.history.lookup(encoder.store, encoder.fingerprint, pieces, model)
        spec = LayoutSpec(block=False) if contexts is None else spec
        return self.prompt(pieces, spec, max_new_tokens, contexts)

    def encodable(
        self, chunks: Sequence[Chunk], method: Method | None = None
    ) -> tuple[Piece | None, list[Piece]]:
        """Pieces to encode ahead: the prefix (None if empty) and the chunks. Raises as `prompt`.

        Their layout is that of ``method``; if it is None or in full attention, the adapter's or
        plain reuse. ValueError: the method takes chunks from prompts that it has served.
        """
        if method is not None and method.history is not None:
            raise ValueError(NOT_AHEAD.format(method.name))
        spec = method and self.spec(method)
        if self.refusal:
            raise ValueError(self.refusal.format("encoding"))
        spec = next((one for one in (spec, self.trained) if one and one.block), LayoutSpec())
        prefix = prefix_ids(self.tokenizer, self.format)
        bos_id = self._bos_id(spec)
        blanks = sink_ids(spec, prefix, self._blank_id(spec), bos_id)
        if self.press is not None:
            self.press.require(build("naive"), spec)
        pieces = []
        encoded = chunk_ids(self.tokenizer, self.format, chunks)
        for index, (chunk, ids) in enumerate(zip(chunks, encoded, strict=True)):
            require_embedded(self.tokenizer, self.num_tokens, prefix, ids)
            ids = wrapped(ids, spec, self.link_base, bos_id)
            name = chunk.title or chunk.text.strip()[:40]
            self._require_room(len(blanks) + len(ids), f"chunk {index} ({name!r})")
            pieces.append(Piece(ids, blanks) if self.press is None else Piece(*self._cut(ids)))
        return (Piece(prefix, is_prefix=True) if prefix else None), pieces

    def _cut(self, chunk: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Splits a chunk into rows with a key after the press, and rows without."""
        count = self.press.count(len(chunk))
        return chunk[:count], chunk[count:]

    def _require_room(self, tokens: int, what: str) -> None:
        if tokens > self.longest:
            error, limit = ValueError, f"reuse on this model is exact up to {self.exact_tokens}"
            if tokens > self.max_tokens:
                error, limit = TooLong, f"this model's maximum context length is {self.max_tokens}"
            advice = "cut chunks smaller or retrieve fewer"
            raise error(f"{what} has {tokens} tokens, {limit} tokens; {advice}")

    def _blank_id(self, spec: LayoutSpec) -> int | None:
        return encode(self.tokenizer, " ")[0] if spec.num_blanks else None

    def _bos_id(self, spec: LayoutSpec) -> int | None:
        if spec.bos != "none" and self.tokenizer.bos_token_id is None:
            raise ValueError(
                f"layout 'bos' is '{spec.bos}', but tokenizer '{self.tokenizer.name_or_path}' has "
                "no BOS token; use bos: none, or num_blanks for blanks"
            )
        return self.tokenizer.bos_token_id
