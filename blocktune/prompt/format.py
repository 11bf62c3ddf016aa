"""A chunk, and the wording of a prompt; the chat template comes from the tokenizer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from string import Formatter
from typing import Any

from blocktune.parsing import build_strict, check_types
from blocktune.registry import require_one_of


@dataclass(frozen=True)
class Chunk:
    """One retrieved passage: the unit that is encoded once and reused in any prompt.

    Raises ValueError if a field has the wrong type, or the text is blank or cannot be encoded.
    """

    text: str  # the passage, never blank
    title: str | None = None  # of its document; an empty title becomes None
    # Other data (id, score, source): not encoded, nor compared, so a passage is cached once.
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    @property
    def document(self) -> str:
        """The name of its document: ``document`` or ``id`` of the metadata, else the title."""
        names = (self.metadata.get("document"), self.metadata.get("id"), self.title)
        return str(next((name for name in names if name is not None), ""))

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
    """Raises ValueError for a lone surrogate, which JSON can contain but UTF-8 cannot encode."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds a lone surrogate (U+{ord(text[error.start]):04X}, character "
            f"{error.start + 1}), which is not text; replace it by U+FFFD"
        ) from None


@dataclass(frozen=True)
class PromptFormat:
    """The wording of a prompt: instruction, then the chunks, then the question.

    A tag is placed by ``turn`` before the instruction; by ``prompt`` before the first turn (after
    BOS) and tokenised separately, as Block-Attention's code does. Raises ValueError if a field has
    the wrong type or lacks its placeholders.
    """

    instruction: str = "Answer the question from the passages below."  # opens the user turn
    system: str | None = None  # text of the system turn; None: the template's default
    titled: str = "{title}\n{text}\n\n"  # a chunk with a title
    untitled: str = "{text}\n\n"  # a chunk without a title
    question: str = "Question: {question}"  # the text after the chunks
    block_tag: str = ""  # tells the model that chunks see only themselves ("[Block-Attention]")
    full_tag: str = ""  # the same for full attention
    tag_place: str = "turn"  # of the tag: ``turn`` or ``prompt``
    strip: bool = False  # whether to strip white space around a passage and after a question

    def __post_init__(self):
        check_types(self, "format")
        require_one_of("format: 'tag_place'", self.tag_place, ("turn", "prompt"))
        for name, wanted in _PLACEHOLDERS.items():
            _check_placeholders(name, getattr(self, name), wanted)
        for name, text in asdict(self).items():
            if isinstance(text, str):
                require_unicode(text, f"format: '{name}'")

    @property
    def untagged(self) -> PromptFormat:
        """The same wording without mode tags, for a teacher that was trained without them."""
        return replace(self, block_tag="", full_tag="")

    def tag(self, block: bool, place: str) -> str:
        """The tag for block or full attention if it belongs at ``place``, else an empty string."""
        return (self.block_tag if block else self.full_tag) if place == self.tag_place else ""

    def opening(self, block: bool) -> str:
        """Start of the user turn: the tag (if it belongs there) and the instruction."""
        return " ".join(part for part in (self.tag(block, "turn"), self.instruction) if part)

    def render_chunk(self, chunk: Chunk) -> str:
        """The text of one chunk, the same anywhere in a prompt."""
        text = chunk.text.strip() if self.strip else chunk.text
        if chunk.title is None:
            return self.untitled.format(text=text)
        return self.titled.format(title=chunk.title, text=text)

    def render_question(self, question: str, safe: Callable[[str], str] = str) -> str:
        """The text from the chunks to the end of the user turn. For ``safe`` see `UserText`."""
        return self.question.format(question=safe(question.rstrip() if self.strip else question))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PromptFormat:
        """Inverse of `to_dict`; fields may be omitted. Raises ValueError for unknown keys."""
        return build_strict(cls, values, "prompt format")


_PLACEHOLDERS = {"titled": {"title", "text"}, "untitled": {"text"}, "question": {"question"}}


def _check_placeholders(name: str, template: str, wanted: set[str]) -> None:
    try:
        found = {part[1:] for part in Formatter().parse(template) if part[1] is not None}
    except ValueError as error:
        raise ValueError(f"format: '{name}' is not a template: {error}, in {template!r}") from None
    if found != {(key, "", None) for key in wanted}:
        shape = " and ".join(f"{{{key}}}" for key in sorted(wanted))
        raise ValueError(f"format: '{name}' must hold {shape} and no other, got {template!r}")
