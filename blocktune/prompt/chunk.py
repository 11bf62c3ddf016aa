"""The reusable span of context."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Chunk:
    """One retrieved passage: what is encoded once and reused anywhere.

    Attributes:
        text: The passage, never blank.
        title: Its document's title, or None; an empty title is stored as None.

    Raises:
        ValueError: If a field is not a string or the text is blank.
    """

    text: str
    title: str | None = None

    def __post_init__(self):
        if not isinstance(self.text, str) or not self.text.strip():
            raise ValueError(f"a chunk's text must be a non-blank string, got {self.text!r:.60}")
        if not isinstance(self.title, str | None):
            raise ValueError(f"a chunk's title must be a string or null, got {self.title!r:.60}")
        if self.title == "":
            object.__setattr__(self, "title", None)
