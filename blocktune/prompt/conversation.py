"""A conversation as the chat template has it: no chunks, full attention."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from blocktune.prompt.bos import check_bos, with_bos
from blocktune.prompt.format import PromptFormat
from blocktune.prompt.pieces import Pieces, answer_ids
from blocktune.prompt.said import Said
from blocktune.prompt.template import render_conversation


def conversation_pieces(
    tokenizer: PreTrainedTokenizerBase,
    fmt: PromptFormat,
    messages: Sequence[tuple[str, str]],
    response: str,
) -> Pieces:
    """Tokenises a conversation and the response to its last message.

    Args:
        tokenizer: Of the model; it needs a chat template.
        fmt: Its ``full_tag`` opens the first message of the user, its ``system`` the conversation
            if that has none; instruction and question's wording are not said.
        messages: (role, text), as `blocktune.data.RagExample` has them.
        response: What the model is trained to write.

    Returns:
        All up to the response as the prefix, no chunks and no query.

    Raises:
        ValueError: If there is no template, or it does not render these messages.

    Source: KVLink trains on Tulu-3 in full attention so (``sft``), arXiv:2502.16002.
    """
    said, spoken = Said(tokenizer), [(role, text) for role, text in messages if role != "system"]
    system = next((text for role, text in messages if role == "system"), fmt.system)
    turns = [(role, said.safe(text)) for role, text in spoken]
    if fmt.full_tag:
        turns[0] = (turns[0][0], f"{fmt.full_tag} {turns[0][1]}")
    rendered = render_conversation(tokenizer, system and said.safe(system), turns)
    prefix = with_bos(tokenizer, said.encode(rendered))
    check_bos(tokenizer, prefix)
    return Pieces(prefix, (), (), answer_ids(tokenizer, response))
