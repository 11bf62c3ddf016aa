"""Prompts: from text to token pieces, and from pieces to the rows of a forward pass."""

from blocktune.lazy import exports

__getattr__, __dir__, __all__ = exports(
    __name__,
    {
        "blocktune.prompt.batch": "Batch pack show stack",
        "blocktune.prompt.format": "Chunk PromptFormat",
        "blocktune.prompt.layout_spec": "LayoutSpec",
        "blocktune.prompt.pieces": "Pieces answer_ids chunk_ids conversation_pieces end_of_turn "
        "make_pieces prefix_ids",
        "blocktune.prompt.rows": "IGNORED Prompt lay_out sink_ids wrapped",
        "blocktune.prompt.special_tokens": "encode",
    },
)
