"""A chunk, and the wording of chunks and question; the chat template is the tokenizer's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from string import Formatter
from typing import Any

from blocktune.parsing import build_strict


@dataclass(frozen=True)
class Chunk:
    """One retrieved passage: what is encoded once and reused anywhere.

    Attributes:
        text: The passage, never blank.
        title: Its document's title, or None; an empty title is stored as None.
        metadata: Whatever else is known of it (id, score, source). Never encoded, and no part of
            equality or hash: the same passage is cached once.

    Raises:
        ValueError: If a field is not of its type, or the text is blank or cannot be encoded.
    """

    text: str
    title: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self):
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(f"a chunk's text must be a non-blank string, got {self.text!r:.60}")
        if not isinstance(self.title, str | None):
            raise ValueError(f"a chunk's title must be a string or null, got {self.title!r:.60}")
        if not isinstance(self.metadata, Mapping):
            raise ValueError(f"a chunk's metadata must be a mapping, got {self.metadata!r:.60}")
        for name in ("text", "title"):
            require_unicode(getattr(self, name) or "", f"a chunk's {name}")
        if self.title == "":
            object.__setattr__(self, "title", None)


def require_unicode(text: str, name: str) -> None:
    """Raises ValueError for half of a surrogate pair, which JSON can spell, but is not text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds a lone surrogate (U+{ord(text[error.start]):04X}, character "
            f"{error.start + 1}), which is not text; replace it by U+FFFD"
        ) from None


TAG_PLACES = ("turn", "prompt")


@dataclass(frozen=True)
class PromptFormat:
    """The wording of a prompt: instruction, then the chunks, then the question.

    Attributes:
        instruction: Opens the user turn, before the chunks; may be empty.
        system: Text of the system turn, or None for the template's own default.
        titled: A chunk that has a title; holds ``{title}`` and ``{text}``.
        untitled: A chunk without a title; holds ``{text}``.
        question: What follows the chunks; holds ``{question}``.
        block_tag: Tells the model that chunks see only themselves (Block-Attention:
            ``[Block-Attention]``); may be empty.
        full_tag: The same in full attention.
        tag_place: Where the tag stands: ``turn``, before the instruction; or ``prompt``, before
            the first turn (after BOS), tokenised apart, as Block-Attention's code does.
        strip: Whether a passage loses the white space around it and a question that behind it.

    Raises:
        ValueError: If a field is not a string or lacks its placeholders.
    """

    instruction: str = "Answer the question from the passages below."
    system: str | None = None
    titled: str = "{title}\n{text}\n\n"
    untitled: str = "{text}\n\n"
    question: str = "Question: {question}"
    block_tag: str = ""
    full_tag: str = ""
    tag_place: str = "turn"
    strip: bool = False

    def __post_init__(self):
        for name in ("instruction", "block_tag", "full_tag"):
            if not isinstance(getattr(self, name), str):
                raise ValueError(f"format '{name}' must be a string, got {getattr(self, name)!r}")
        if not isinstance(self.system, str | None):
            raise ValueError(f"format 'system' must be a string or null, got {self.system!r}")
        if self.tag_place not in TAG_PLACES:
            raise ValueError(f"format 'tag_place' must be turn or prompt, got {self.tag_place!r}")
        if not isinstance(self.strip, bool):
            raise ValueError(f"format 'strip' must be true or false, got {self.strip!r}")
        for name, wanted in _PLACEHOLDERS.items():
            _check_placeholders(name, getattr(self, name), wanted)
        for name, text in asdict(self).items():
            if isinstance(text, str):
                require_unicode(text, f"format '{name}'")

    @property
    def untagged(self) -> PromptFormat:
        """The wording without mode tags, for a teacher, which was trained without."""
        return replace(self, block_tag="", full_tag="")

    def tag(self, block: bool, place: str) -> str:
        """The tag of a mode, if it belongs at ``place``, else nothing."""
        return (self.block_tag if block else self.full_tag) if place == self.tag_place else ""

    def opening(self, block: bool) -> str:
        """What opens the user turn: the tag of the mode (if it belongs there), the instruction."""
        return " ".join(part for part in (self.tag(block, "turn"), self.instruction) if part)

    def render_chunk(self, chunk: Chunk) -> str:
        """The text of one chunk, the same in every place."""
        text = chunk.text.strip() if self.strip else chunk.text
        if chunk.title is None:
            return self.untitled.format(text=text)
        return self.titled.format(title=chunk.title, text=text)

    def render_question(self, question: str, safe: Callable[[str], str] = str) -> str:
        """The text between the chunks and the end of the user turn; ``safe``: see `UserText`."""
        return self.question.format(question=safe(question.rstrip() if self.strip else question))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, every field."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptFormat:
        """Inverse of `to_dict`; ValueError if a key is unknown. Fields may be left out."""
        return build_strict(cls, values, "prompt format")


_PLACEHOLDERS = {"titled": {"title", "text"}, "untitled": {"text"}, "question": {"question"}}


def _check_placeholders(name: str, template: Any, wanted: set[str]) -> None:
    shape = " and ".join(f"{{{key}}}" for key in sorted(wanted))
    if not isinstance(template, str):
        raise ValueError(f"format '{name}' must be a string that holds {shape}, got {template!r}")
    try:
        parts = list(Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"format '{name}' is not a template: {error}, in {template!r}") from None
    found = {field for _, field, _, _ in parts if field is not None}
    plain = all(not spec and conversion is None for _, _, spec, conversion in parts)
    if found != wanted or not plain:
        raise ValueError(f"format '{name}' must hold {shape} and no other, got {template!r}")
