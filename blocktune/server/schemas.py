"""Requests: OpenAI's, with documents and a field ``blocktune``.

Documents have the forms that `RagExample` reads, or are Anthropic's blocks, also in a message.
Unsupported fields are refused if they would change the answer, and ignored otherwise.
"""

import re
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Literal, TypeVar

import pydantic
from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, StrictBool, model_validator

from blocktune.data.example import near_miss

Text = Annotated[str, Field(max_length=4_000_000)]


def _number(value: Any) -> Any:
    """Refuses what pydantic would convert: texts, and true as 1."""
    if isinstance(value, (bool, str)):
        raise ValueError(f"must be a number, got {value!r:.40}")
    return value


Number = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Whole = Annotated[int, BeforeValidator(_number)]
INT64 = 1 << 63
MOST_DOCUMENTS = 4096  # of a request at any server's limit
Id = Annotated[str, Field(max_length=512)]
Ids = Annotated[list[pydantic.StrictInt], Field(min_length=1, max_length=1 << 20, fail_fast=True)]
Stop = Annotated[str, Field(max_length=256)]
T = TypeVar("T", bound=BaseModel)

OWN_PLACE: dict[str, tuple] = dict.fromkeys(("chunks", "method", "strip"), ())
"""Fields of our own that belong elsewhere in a request, see `FIXES`."""
NEUTRAL: dict[str, tuple] = {
    **dict.fromkeys(("frequency_penalty", "presence_penalty", "min_p", "min_tokens"), (0,)),
    **dict.fromkeys(("repetition_penalty", "length_penalty"), (1,)),
    **dict.fromkeys(("tools", "functions", "stop_token_ids", "bad_words"), ([],)),
    "allowed_token_ids": ([],),
    **dict.fromkeys(("logit_bias", "chat_template_kwargs"), ({},)),
    **dict.fromkeys(("echo", "ignore_eos", "use_beam_search", "continue_final_message"), (False,)),
    "include_stop_str_in_output": (False,),
    **dict.fromkeys(("add_generation_prompt", "skip_special_tokens"), (True,)),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ()),
    **dict.fromkeys(("structured_outputs", "chat_template", "truncate_prompt_tokens"), ()),
    "response_format": ({"type": "text"}, {}),
    "modalities": (["text"],),
    "suffix": ("",),
    **dict.fromkeys(("tool_choice", "function_call"), ("none", "auto")),
    "extra_body": (),
    **OWN_PLACE,
}
"""Fields of OpenAI's and vLLM's interfaces that change an answer, and the values that do not."""
CALLS: dict[str, tuple] = {"tool_calls": ([],), "function_call": ()}
"""Fields of a message that would be lost, with the values that say nothing."""
FIXES = {"extra_body": "put its fields into the body", "chunks": "send them as documents"}
FIXES |= dict.fromkeys(("method", "strip"), "put it into the field blocktune")
_FORM = re.compile(r"DocumentBlock|constrained-str|.*\[.*")
"""Names of a field's alternatives, which pydantic adds to the location of an error."""


class WrongField(ValueError):
    """A request with a wrong field: its path (``messages.0.role``), and OpenAI's error code."""

    def __init__(self, message: str, param=None, status: int = 400, code: str | None = None):
        super().__init__(message)
        self.param, self.status, self.code = param, status, code


def read_body(kind: type[T], body: bytes, most: int) -> T:
    """Parses a JSON body of at most about ``most`` values; raises `WrongField` if it is invalid."""
    values = sum(map(body.count, (b",", b"[", b"{")))
    if values > most:
        raise WrongField(f"the body has {values:,} values, the server reads {most:,} at most")
    return validated(kind.model_validate_json, body.removeprefix(BOM_UTF8))


def validated(validate: Callable[[Any], T], body: Any) -> T:
    """Calls pydantic's ``validate``. Raises `WrongField` as `read_body` does."""
    try:
        return validate(body)
    except pydantic.ValidationError as error:
        errors = error.errors(include_url=False, include_input=False, include_context=False)
    # of the alternative that fits best
    deepest = max(errors, key=lambda item: (len(item["loc"]), "_type" not in item["type"]))
    path = ".".join(part for part in map(str, deepest["loc"]) if not _FORM.fullmatch(part))[:200]
    message = deepest["msg"].removeprefix("Value error, ")
    raise WrongField(" ".join((f"{path}: {message}" if path else message).split()), path or None)


def refuse_fields(body: Mapping[str, Any], neutral: Mapping[str, tuple]) -> None:
    """Raises ValueError if the body has one of these fields with another value than the given."""
    for name, values in neutral.items():
        if body.get(name) is not None and body[name] not in values:
            raise ValueError(f"{name} is not supported; {FIXES.get(name, 'leave it out')}")


def refuse_misspelt(body: Mapping[str, Any], names: list[str], known: Iterable[str]) -> None:
    """Raises ValueError if an unknown field of the body looks like one of ``names``."""
    known = {*names, *known}
    unknown = [key for key in body if key not in known]
    if match := near_miss(unknown, [name for name in names if body.get(name) is None]):
        raise ValueError(f"unknown field {match[0]!r:.80}; did you mean '{match[1]}'?")


class TextSource(BaseModel):
    """A document's text in an Anthropic block; images and files are not read."""

    type: Literal["text"]
    data: Text


class TextBlock(BaseModel):
    """A text part of a message."""

    type: Literal["text"]
    text: Text


class DocumentBlock(BaseModel):
    """Anthropic's content block: one chunk."""

    type: Literal["document"]
    source: TextSource
    id: Id | None = None
    title: Text | None = None
    context: Text | None = None


def _no_block(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("type") == "document" and "source" in value:
        raise ValueError("not a valid document block")  # the error of `DocumentBlock` is shown
    return value


Fields = Annotated[dict[str, Any], AfterValidator(_no_block)]  # read as in a file, by `read_chunk`
Document = Annotated[Text | DocumentBlock | Fields, Field(union_mode="left_to_right")]
Documents = Annotated[list[Document], Field(max_length=MOST_DOCUMENTS, fail_fast=True)]
Block = Annotated[TextBlock | DocumentBlock, Field(discriminator="type")]
Blocks = Annotated[list[Block], Field(max_length=MOST_DOCUMENTS, fail_fast=True)]


class Message(BaseModel):
    """One turn. ``developer`` is read as ``system``, no content as an empty text."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Blocks | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_calls(cls, message: Any) -> Any:
        refuse_fields(message if isinstance(message, dict) else {}, CALLS)
        return message


Messages = Annotated[list[Message], Field(min_length=1, max_length=1024, fail_fast=True)]


class Extension(BaseModel, extra="forbid"):
    """The field ``blocktune``: what OpenAI's interface does not have.

    ``method`` is as on the command line, or a mapping as in a suite; ``params`` are its first
    preset's. ``strip`` requests whether each token of the prompt was reused.
    """

    method: Annotated[str, Field(min_length=1, max_length=300)] | dict[str, Any] | None = None
    params: dict[str, Any] | None = None
    strip: StrictBool | None = False


class StreamOptions(BaseModel):
    """Whether a stream ends with an event that has the usage."""

    include_usage: StrictBool | None = False


class Decoding(BaseModel):
    """Fields of chat and plain completions; without a temperature decoding is greedy."""

    model: str | None = None
    documents: Documents | None = None
    max_tokens: Annotated[Whole, Field(ge=1, lt=INT64)] | None = None
    max_completion_tokens: Annotated[Whole, Field(ge=1, lt=INT64)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[Whole, Field(ge=-1, lt=1 << 31)] | None = None  # -1: all, as vLLM has it
    seed: Annotated[Whole, Field(ge=-INT64, lt=INT64)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    n: Annotated[Whole, Field(ge=1, lt=1 << 31)] | None = None
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    user: str | None = None
    blocktune: Extension | None = None

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        refuse_fields(body, NEUTRAL)
        refuse_misspelt(body, list(cls.model_fields), NEUTRAL)
        return body

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer; empty ones are ignored."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)


class ChatRequest(Decoding):
    """``POST /v1/chat/completions``."""

    messages: Messages
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; None: no log probabilities."""
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Decoding):
    """``POST /v1/completions``: continues a text without a chat template."""

    prompt: Text | Ids
    logprobs: Annotated[Whole, Field(ge=0, le=20)] | None = None
    best_of: Whole | None = None

    @pydantic.field_validator("prompt", mode="before")
    @classmethod
    def _take_the_only_one(cls, value: Any) -> Any:
        if not isinstance(value, list) or not all(isinstance(item, (str, list)) for item in value):
            return value
        if len(value) != 1:
            raise ValueError(f"must be one prompt, got {len(value)}; send a request for each")
        return value[0]

    @model_validator(mode="after")
    def _refuse_best_of(self):
        if self.best_of not in (None, self.n or 1):
            raise ValueError("best_of is not supported; use n")
        return self

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; None: no log probabilities."""
        return self.logprobs


class ChunksRequest(BaseModel, extra="forbid"):
    """``POST /v1/chunks``: documents to encode ahead of time, for the default method.

    Pinned chunks are never evicted; they stay until they are deleted.
    """

    model: str | None = None
    documents: Annotated[Documents, Field(min_length=1)]
    cache_salt: Annotated[str, Field(min_length=1, max_length=512)] | None = None
    pin: StrictBool | None = False
