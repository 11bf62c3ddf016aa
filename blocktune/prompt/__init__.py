"""Prompts: one way from text to token pieces, and from pieces to the rows of a forward pass."""

from blocktune.prompt.batch import Batch, pack, show, stack
from blocktune.prompt.format import Chunk, PromptFormat
from blocktune.prompt.pieces import (
    Pieces,
    answer_ids,
    chunk_ids,
    conversation_pieces,
    end_of_turn,
    make_pieces,
    prefix_ids,
)
from blocktune.prompt.rows import IGNORED, LayoutSpec, Prompt, lay_out, sink_ids, wrapped
from blocktune.prompt.special_tokens import encode

__all__ = [
    "IGNORED",
    "Batch",
    "Chunk",
    "LayoutSpec",
    "Pieces",
    "Prompt",
    "PromptFormat",
    "answer_ids",
    "chunk_ids",
    "conversation_pieces",
    "encode",
    "end_of_turn",
    "lay_out",
    "make_pieces",
    "pack",
    "prefix_ids",
    "show",
    "sink_ids",
    "stack",
    "wrapped",
]
