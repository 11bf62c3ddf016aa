"""Tokenises a prompt's text into pieces, by the same functions for training and serving."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.prompt import special_tokens as special
from blocktune.prompt.format import Chunk, PromptFormat
from blocktune.prompt.special_tokens import Ids, UserText, encode, encode_user_texts
from blocktune.prompt.template import around_reply, render_conversation, render_frame, render_next


class Pieces(NamedTuple):
    """Token ids of one prompt, piece by piece."""

    prefix: Ids  # BOS, system turn, start of the user turn, instruction
    chunks: tuple[Ids, ...]  # each depends only on chunk, format and tokenizer
    query: Ids  # question, end of the user turn, start of the assistant's turn
    answer: Ids = ()  # response and end of turn; empty when serving
    followups: tuple[tuple[Ids, Ids], ...] = ()  # query and answer of further turns, in training

    @property
    def context(self) -> Ids:
        """Prefix and chunks."""
        return tuple(chain(self.prefix, *self.chunks))

    @property
    def shareable(self) -> Ids:
        """What later prompts may begin with: the context, or without chunks all but one token."""
        return self.context if self.chunks else (self.prefix + self.query)[:-1]

    @property
    def all(self) -> tuple[Ids, ...]:
        """All pieces in order."""
        return self.prefix, *self.chunks, self.query, self.answer, *chain(*self.followups)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all pieces."""
        return sum(map(len, self.all))


def make_pieces(
    tokenizer: PreTrainedTokenizerBase,
    fmt: PromptFormat,
    chunks: Sequence[Chunk],
    question: str,
    response: str | None = None,
    block: bool = True,
    followups: Sequence[tuple[str, str]] = (),
) -> Pieces:
    """Tokenises prefix, chunks, query and answer, through the tokenizer's chat template, if any.

    The format may have a tag for ``block`` attention. ``response`` is the text to learn (None when
    serving); ``followups`` are further questions and their responses. Raises ValueError if there is
    no chunk or one has no tokens, the template drops user text, there are followups without a
    response, or BOS occurs anywhere but at the start.
    """
    if not chunks:
        raise ValueError("a prompt needs at least one chunk, got an empty list")
    if followups and response is None:
        raise ValueError("followups come after an answer, but the first question has no response")
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
    """The prefix that `make_pieces` gives every prompt with this tokenizer and format."""
    return make_pieces(tokenizer, fmt, [Chunk("any")], "any", block=block).prefix


def open_prompt(
    tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, first: Ids, block: bool
) -> Ids:
    """Puts BOS (if the model has one) and the format's tag before a prompt's ``first`` tokens."""
    ids = special.with_bos(tokenizer, first)
    bos = int(ids[:1] == (tokenizer.bos_token_id,))
    return ids[:bos] + encode(tokenizer, fmt.tag(block, "prompt")) + ids[bos:]


def chunk_ids(
    tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, chunks: Sequence[Chunk]
) -> tuple[Ids, ...]:
    """Token ids of each chunk, to be encoded and stored, the same in any prompt.

    Special tokens written in a passage stay text. Raises ValueError if a chunk has no tokens.
    """
    chunks_ids = encode_user_texts(tokenizer, map(fmt.render_chunk, chunks))
    for chunk, ids in zip(chunks, chunks_ids, strict=True):
        if not ids:
            raise ValueError(f"the tokenizer produces no tokens for chunk {chunk!r:.60}")
    return tuple(chunks_ids)


def answer_ids(tokenizer: PreTrainedTokenizerBase, response: str) -> Ids:
    """Tokens that the model is trained to write: the response and the end of its turn."""
    if tokenizer.chat_template is None:  # after "Answer:"; Llama 2's tokenizer adds its own space
        (first, *_) = tokenizer.convert_ids_to_tokens(encode(tokenizer, "a"))
        response = response if first.startswith("\u2581") else f" {response}"
    return encode(tokenizer, response, split_special_tokens=True) + end_of_turn(tokenizer)


def next_query_ids(tokenizer: PreTrainedTokenizerBase, fmt: PromptFormat, question: str) -> Ids:
    """Tokens of a further question, from the end of an assistant's turn to the start of its next.

    ValueError: the template does not end the assistant's turn as `end_of_turn` does.
    """
    texts = UserText(tokenizer)
    ids = texts.encode(render_next(tokenizer, fmt.render_question(question, texts.safe)))
    if tokenizer.chat_template is None:
        return ids
    end = end_of_turn(tokenizer)
    if ids[: len(end)] != end:
        raise ValueError(
            f"the chat template of '{tokenizer.name_or_path}' ends a reply differently before a "
            "second user turn; leave followups out"
        )
    return ids[len(end) :]


@special.remembered("chat_template", "eos_token_id")
def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> Ids:
    """Tokens that end the assistant's turn. Generation stops at the last of them.

    They are what the template writes after a reply, up to the first special token, else EOS.
    Raises ValueError if there is neither.
    """
    ids = encode(tokenizer, around_reply(tokenizer).after)
    stops = {*special.special_tokens(tokenizer).values(), tokenizer.eos_token_id}
    ends = [index for index, token in enumerate(ids) if token in stops]
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
    """Tokenises messages (role, text) as the prefix, and the response as the answer.

    The format's ``full_tag`` goes before the first user message, or the prompt. Its ``system`` is
    used if there is no system message. Raises ValueError if no template renders these messages.
    Source: KVLink's training on Tulu-3 (``sft``), arXiv:2502.16002.
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
