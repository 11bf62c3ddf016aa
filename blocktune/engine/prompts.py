"""From a request to the prompt that a method reads, with the limits of the model checked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from transformers import PreTrainedTokenizerBase

from blocktune.engine.encode import Piece
from blocktune.prompt import (
    Chunk,
    LayoutSpec,
    Pieces,
    Prompt,
    PromptFormat,
    chunk_ids,
    lay_out,
    make_pieces,
    prefix_ids,
)
from blocktune.reuse import Method


class Request(Protocol):
    """What the engine needs of an example: `blocktune.data.RagExample` is one."""

    @property
    def question(self) -> str:
        """What is asked."""

    @property
    def chunks(self) -> Sequence[Chunk]:
        """The retrieved chunks, in prompt order."""


@dataclass(frozen=True)
class PromptMaker:
    """Makes prompts for one model.

    Attributes:
        tokenizer: The model's.
        format: Wording.
        trained: Layout that the model's adapter was trained for, or None.
        link_base: Id of link slot 0, or None without links.
        max_tokens: Tokens that the model's context holds.
        num_layers: Decoder layers of the model.
    """

    tokenizer: PreTrainedTokenizerBase
    format: PromptFormat
    trained: LayoutSpec | None
    link_base: int | None
    max_tokens: int
    num_layers: int

    def pieces(self, request: Request, method: Method) -> Pieces:
        """Token pieces of a request as ``method`` reads it."""
        pieces = make_pieces(self.tokenizer, self.format, request.chunks, request.question)
        return pieces if method.keeps_context else pieces._replace(chunks=())

    def spec(self, method: Method) -> LayoutSpec:
        """The rows that ``method`` wants.

        Raises:
            ValueError: If the method needs another adapter than the model's, or more layers.
        """
        check = method.selection().check_layer
        if check is not None and check >= self.num_layers:
            raise ValueError(
                f"check_layer must be below the model's {self.num_layers} layers, got {check}"
            )
        return method.layout(self.trained)

    def prompt(self, pieces: Pieces, spec: LayoutSpec, max_new_tokens: int = 0) -> Prompt:
        """Lays pieces out.

        Raises:
            ValueError: If they and the answer do not fit into the model's context.
        """
        ghost_id = self._blank() if spec.num_ghosts else None
        prompt = lay_out(pieces, spec, self.link_base, ghost_id)
        longest = max(map(len, pieces.chunks), default=0)
        self._require_room(longest, "the longest chunk")
        what = f"a prompt of {len(pieces.chunks)} chunks with {max_new_tokens} tokens to answer"
        self._require_room(len(prompt.ids) + max_new_tokens, what)
        return prompt

    def encodable(self, chunks: Sequence[Chunk]) -> tuple[Piece | None, list[Piece]]:
        """The prefix (None if empty) and the chunks, as they are encoded for plain reuse.

        Raises:
            ValueError: If a chunk does not fit into the model's context.
        """
        spec = self.trained or LayoutSpec()
        prefix = prefix_ids(self.tokenizer, self.format)
        blank = (self._blank(),) if spec.num_ghosts else ()
        ghosts = prefix if spec.shared_prefix else blank * spec.num_ghosts
        pieces = []
        for index, chunk in enumerate(chunks):
            ids = chunk_ids(self.tokenizer, self.format, chunk)
            name = chunk.title or chunk.text.strip()[:40]
            self._require_room(len(ghosts) + len(ids), f"chunk {index} ({name!r})")
            pieces.append(Piece(ids, ghosts))
        return (Piece(prefix) if prefix else None), pieces

    def _require_room(self, tokens: int, what: str) -> None:
        if tokens > self.max_tokens:
            raise ValueError(
                f"{what} has {tokens} tokens, the model's context holds {self.max_tokens}; "
                "cut chunks smaller or retrieve fewer"
            )

    def _blank(self) -> int:
        return self.tokenizer(" ", add_special_tokens=False)["input_ids"][0]
