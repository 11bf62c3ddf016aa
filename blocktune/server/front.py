"""Reads messages, documents and the method of a request, and makes token pieces.

It needs no engine and no model, so that vLLM's server can use it. The chunks are placed in the
user's last turn, as for a single question. Earlier turns are the prefix: exact, computed in full
attention. Documents of earlier messages are chunks too, so that every turn finds them in the cache.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from transformers import PreTrainedTokenizerBase

from blocktune.data.example import read_chunk
from blocktune.methods import Method, build, build_entry
from blocktune.prompt import Chunk, Pieces, PromptFormat, chunk_ids, encode, template
from blocktune.prompt.format import require_unicode
from blocktune.prompt.pieces import open_prompt
from blocktune.prompt.special_tokens import UserText, check_bos, with_bos
from blocktune.server.schemas import Document, DocumentBlock, Extension, Message

Turn = tuple[str, str]  # role and text
LARGEST = 1e9  # of a method's parameters; larger ones could overflow


class Conversation(NamedTuple):
    """The messages of a request."""

    system: str | None  # text of the system's turns, or None
    earlier: tuple[Turn, ...]  # the turns before the last one
    question: str  # the user's last turn, without its documents
    documents: tuple[DocumentBlock, ...]  # document blocks of all messages, in order

    @property
    def texts(self) -> tuple[str, ...]:
        """All its texts, without the documents."""
        return (self.system or "", *(text for _, text in self.earlier), self.question)


def read_documents(documents: Sequence[Document]) -> tuple[Chunk, ...]:
    """The chunks that `blocktune encode` makes of documents; ValueError: one has no text."""
    return tuple(_chunk(document, f"documents[{i}]") for i, document in enumerate(documents))


def _chunk(document: Document, name: str) -> Chunk:
    if isinstance(document, DocumentBlock):
        text = "\n".join(filter(None, (document.context, document.source.data)))
        document = {"text": text, "title": document.title, "id": document.id}
    chunk, own = read_chunk(document, name), isinstance(document, dict) and document.get("id")
    if own in (None, False, chunk.metadata.get("id")):
        return chunk
    # An answer names documents as the client does, not as a nested hit is named.
    return dataclasses.replace(chunk, metadata={**chunk.metadata, "id": own})


def read_messages(messages: Sequence[Message]) -> Conversation:
    """Splits messages; consecutive turns of one role are joined, as most templates refuse them.

    Raises ValueError if the last message is not the user's, or a text is not valid Unicode.
    """
    system: list[str] = []
    turns: list[Turn] = []
    documents: list[DocumentBlock] = []
    for index, message in enumerate(messages):
        text = message.content or ""
        if not isinstance(text, str):
            documents += [part for part in text if isinstance(part, DocumentBlock)]
            text = "\n".join(part.text for part in text if not isinstance(part, DocumentBlock))
        require_unicode(text, f"messages[{index}]")
        if message.role in ("system", "developer"):
            system.append(text)
        elif turns and turns[-1][0] == message.role:
            turns[-1] = (message.role, "\n\n".join(filter(None, (turns[-1][1], text))))
        else:
            turns.append((message.role, text))
    if not turns or turns[-1][0] != "user" or not turns[-1][1].strip():
        raise ValueError("the last message must have the role 'user' and a text: the question")
    whole = "\n\n".join(filter(None, system)) or None
    return Conversation(whole, tuple(turns[:-1]), turns[-1][1], tuple(documents))


def chat_pieces(
    tokenizer: PreTrainedTokenizerBase,
    fmt: PromptFormat,
    chunks: Sequence[Chunk],
    conversation: Conversation,
    block: bool = True,
) -> Pieces:
    """Tokenises a conversation over chunks; a single question gives the same as `make_pieces`.

    Without chunks the question is used unchanged. Raises ValueError if the chat template does not
    render the turns, or a chunk has no tokens.
    """
    texts = UserText(tokenizer)
    head, tail = "", texts.safe(conversation.question)
    if chunks:
        opening = fmt.opening(block)
        head = f"{opening}\n\n" if opening else ""
        tail = fmt.render_question(conversation.question, texts.safe)
    system = fmt.system if conversation.system is None else texts.safe(conversation.system)
    earlier = [(role, texts.safe(text)) for role, text in conversation.earlier]
    frame = _render(tokenizer, system, earlier, head, tail)
    opening = texts.encode(frame.before)
    tagged = fmt if chunks else fmt.untagged
    prefix = open_prompt(tokenizer, tagged, opening, block)
    bodies = chunk_ids(tokenizer, fmt, chunks)
    query = texts.encode(frame.after)
    check_bos(tokenizer, prefix, *bodies, query)
    return Pieces(prefix, bodies, query)


def _render(
    tokenizer, system: str | None, earlier: Sequence[Turn], head: str, tail: str
) -> template.Frame:
    if not earlier or tokenizer.chat_template is None:
        dialogue = "".join(
            f" {text}\n\n" if role == "assistant" else text + template.PLAIN_REPLY_CUE
            for role, text in earlier
        )
        return template.render_frame(tokenizer, system, dialogue + head, tail)
    turns = [*earlier, ("user", head + template.SENTINEL + tail)]
    whole = template.render_conversation(tokenizer, system, turns)
    if whole.count(template.SENTINEL) != 1:
        what = f"the chat template of '{tokenizer.name_or_path}'"
        raise ValueError(f"{what} does not render the last turn once; send a single question")
    return template.Frame(*whole.split(template.SENTINEL))


def plain_pieces(
    tokenizer: PreTrainedTokenizerBase,
    fmt: PromptFormat,
    chunks: Sequence[Chunk],
    prompt: str | Sequence[int],
    block: bool = True,
) -> Pieces:
    """Tokenises chunks and a text to continue, whose special tokens are parsed, without a template.

    Raises ValueError if it has no tokens, or ids that the tokenizer does not have.
    """
    if isinstance(prompt, str):
        require_unicode(prompt, "prompt")
        query = encode(tokenizer, prompt)
    else:
        query = tuple(prompt)
        if not all(0 <= token < len(tokenizer) for token in query):
            raise ValueError(f"prompt: token ids must be from 0 to {len(tokenizer) - 1}")
    bos = tokenizer.bos_token_id
    prefix = () if query[:1] == (bos,) else with_bos(tokenizer, ())
    if query[:1] == (bos,) and chunks:
        prefix, query = query[:1], query[1:]
    if not query and not chunks:
        prefix, query = (), prefix
    if not query:
        raise ValueError("prompt: it has no tokens")
    return Pieces(prefix, chunk_ids(tokenizer, fmt, chunks), query)


def read_method(extension: Extension, default: Method) -> Method:
    """A request's method. Raises ValueError if it cannot be built, or a number is too large."""
    text, params = extension.method, extension.params
    if isinstance(text, Mapping):
        if params:
            raise ValueError("a method given as a mapping takes its parameters in it, as 'params'")
        return _checked(build_entry, text)
    if params:
        return _checked(build, default.name if text is None else text, **params)
    return default if text is None else _named(text)


@lru_cache(256)
def _named(text: str) -> Method:
    return _checked(build, text)


def _checked(make: Callable[..., Method], *args: Any, **params: Any) -> Method:
    try:
        method = make(*args, **params)
        values = list(_values(dataclasses.asdict(method)))
    except (TypeError, ArithmeticError, LookupError, AttributeError, RecursionError) as error:
        raise ValueError(f"blocktune.method: {error}") from None
    wrong = [v for v in values if isinstance(v, int | float) and not abs(v) <= LARGEST]  # or NaN
    if wrong:
        raise ValueError(f"blocktune.method: numbers are at most {LARGEST:g}, got {wrong[0]!r:.40}")
    return method


def _values(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, list | tuple | set | frozenset):
        for item in value:
            yield from _values(item)
    else:
        yield value
