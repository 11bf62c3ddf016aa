"""From text to token pieces: the one function that training, caching and serving call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.prompt import special_tokens as special
from blocktune.prompt.format import Chunk, PromptFormat
from blocktune.prompt.special_tokens import Ids, UserText, encode, encode_all
from blocktune.prompt.template import render_conversation, render_frame, render_next, reply_end


class Pieces(NamedTuple):
    """Token ids of one prompt, piece by piece."""

    prefix: Ids  # BOS, system turn, opening of the user turn, instruction
    chunks: tuple[Ids, ...]  # of each: depends only on chunk, format and tokenizer
    query: Ids  # question, end of the user turn, opening of the assistant's
    answer: Ids = ()  # response and end of turn; empty when serving
    followups: tuple[tuple[Ids, Ids], ...] = ()  # further turns in training: query and answer

    @property
    def context(self) -> Ids:
        """Prefix and chunks: what a later prompt may begin with, too."""
        return sum(self.chunks, self.prefix)

    @property
    def num_tokens(self) -> int:
        """Tokens of all pieces."""
        turns = [piece for turn in self.followups for piece in turn]
        return sum(map(len, (self.prefix, *self.chunks, self.query, self.answer, *turns)))


def make_pieces(
    tokenizer: PreTrainedTokenizerBase,
    fmt: PromptFormat,
    chunks: Sequence[Chunk],
    question: str,
    response: str | None = None,
    block: bool = True,
    followups: Sequence[tuple[str, str]] = (),
) -> Pieces:
    """Tokenises prefix, chunks, query and answer, through the tokenizer's chat template.

    Without a template the prompt is plain text. The format may have a tag for ``block`` attention.
    ``response`` is what the model is trained to write (None when serving), ``followups`` are
    questions after it, and their responses.

    Raises:
        ValueError: If there is no chunk or one has no tokens, the template does not hold user
            text, followups have no response before, or BOS is not exactly once in the pieces.
    """
    if not chunks:
        raise ValueError("a prompt needs at least one chunk, got an empty list")
    if followups and response is None:
        raise ValueError("followups come after an answer, and the first question has no response")
    opening = fmt.opening(block)
    head = f"{opening}\n\n" if opening else ""
    texts = UserText(tokenizer)
    frame = render_frame(tokenizer, fmt.system, head, fmt.render_question(question, texts.safe))
    prefix = open_prompt(tokenizer, fmt, encode(tokenizer, frame.before), block)
    bodies = chunk_ids(tokenizer, fmt, chunks)
    query = texts.encode(frame.after)
    answer = () if response is None else answer_ids(tokenizer, response)
    turns = tuple(
        (next_query_ids(tokenizer, fmt, more), answer_ids(tokenizer, reply))
        for more, reply in followups
    )
    special.check_bos(tokenizer, prefix, *bodies, query, *(ids for ids, _ in turns))
    return Pieces(prefix, bodies, query, answer, turns)


def prefix_ids(tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, block: bool = True) -> Ids:
    """The prefix of every prompt of this tokenizer and format, ``make_pieces(...).prefix``."""
    return make_pieces(tokenizer, fmt, [Chunk("any")], "any", block=block).prefix


def open_prompt(
    tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, first: Ids, block: bool
) -> Ids:
    """A prompt's ``first`` tokens, opened by BOS (if the model has one) and the format's tag."""
    ids = special.with_bos(tokenizer, first)
    bos = int(ids[:1] == (tokenizer.bos_token_id,))
    return ids[:bos] + encode(tokenizer, fmt.tag(block, "prompt")) + ids[bos:]


def chunk_ids(
    tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, chunks: Sequence[Chunk]
) -> tuple[Ids, ...]:
    """Token ids of each chunk, the same at any place in a prompt: what is encoded and stored.

    Special tokens written out in a passage (``<|eot_id|>``) stay text: it cannot end the turn.
    Raises ValueError if a chunk has no tokens.
    """
    made = encode_all(tokenizer, map(fmt.render_chunk, chunks), split_special_tokens=True)
    for chunk, ids in zip(chunks, made, strict=True):
        if not ids:
            raise ValueError(f"the tokenizer makes no token of chunk {chunk!r:.60}")
    return tuple(made)


def answer_ids(tokenizer: PreTrainedTokenizerBase, response: str) -> Ids:
    """Tokens the model is trained to write: the response and the end of its turn."""
    body = encode(tokenizer, _lead(tokenizer) + response, split_special_tokens=True)
    return body + end_of_turn(tokenizer)


def _lead(tokenizer) -> str:
    """The space after "Answer:" in plain text, unless the tokenizer adds it (Llama 2)."""
    if tokenizer.chat_template is not None:
        return ""
    (first, *_) = tokenizer.convert_ids_to_tokens(encode(tokenizer, "a"))
    return "" if first.startswith("\u2581") else " "


def next_query_ids(tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, question: str) -> Ids:
    """Tokens between the end of an assistant's turn and the start of its next: a question.

    Raises ValueError if the template does not end the assistant's turn as `end_of_turn` does.
    """
    texts = UserText(tokenizer)
    ids = texts.encode(render_next(tokenizer, fmt.render_question(question, texts.safe)))
    if tokenizer.chat_template is None:
        return ids
    end = end_of_turn(tokenizer)
    if ids[: len(end)] != end:
        raise ValueError(
            f"the chat template of '{tokenizer.name_or_path}' ends a reply in another way before a "
            "second user turn; leave followups out"
        )
    return ids[len(end) :]


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Tokens that end the assistant's turn; generation stops at the last of them.

    These are what the template writes after the assistant's text, up to the first special token, or
    the tokenizer's EOS. Raises ValueError if there is neither.
    """
    key = "end", str(tokenizer.chat_template), tokenizer.eos_token_id, len(tokenizer)
    return special.remembered(tokenizer, key, lambda: _end_of_turn(tokenizer))


def _end_of_turn(tokenizer: PreTrainedTokenizerBase) -> Ids:
    ids = encode(tokenizer, reply_end(tokenizer))
    known = {*special.special_tokens(tokenizer).values(), tokenizer.eos_token_id}
    ends = [index for index, token in enumerate(ids) if token in known]
    if ends:
        return ids[: ends[0] + 1]
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer '{tokenizer.name_or_path}' has neither an EOS token nor a chat template "
            f"that ends the assistant's turn; set tokenizer.eos_token"
        )
    return (tokenizer.eos_token_id,)


def conversation_pieces(
    tokenizer: PreTrainedTokenizerBase,
    fmt: PromptFormat,
    messages: Sequence[tuple[str, str]],
    response: str,
) -> Pieces:
    """Tokenises messages (role, text) and the response: all but the response is the prefix.

    The format's ``full_tag`` opens the first message of the user, or the prompt; its ``system`` is
    the system turn if there is none. Raises ValueError if no template renders these messages.

    Source: KVLink trains on Tulu-3 in full attention this way (``sft``), arXiv:2502.16002.
    """
    texts = UserText(tokenizer)
    system = next((text for role, text in messages if role == "system"), fmt.system)
    turns = [(role, texts.safe(text)) for role, text in messages if role != "system"]
    if tag := fmt.tag(False, "turn"):
        turns[0] = (turns[0][0], f"{tag} {turns[0][1]}")
    rendered = render_conversation(tokenizer, system and texts.safe(system), turns)
    prefix = open_prompt(tokenizer, fmt, texts.encode(rendered), block=False)
    special.check_bos(tokenizer, prefix)
    return Pieces(prefix, (), (), answer_ids(tokenizer, response))
