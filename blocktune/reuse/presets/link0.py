"""Chunks encoded after blanks."""

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.prompt import LayoutSpec
from blocktune.reuse.base import Method, register


@register("link0")
@dataclass(frozen=True)
class Link0(Method):
    """Encodes each chunk after blanks, whose keys take the attention sink and are dropped.

    Nothing is recomputed. The study tunes the number of blanks in {1, 2, 3, 5, 10}.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    # The chunk was encoded after blanks, which a full prefill does not have.
    exact_on_one_chunk: ClassVar[bool] = False
    blanks: int = 1

    def __post_init__(self):
        if type(self.blanks) is not int or self.blanks < 1:
            raise ValueError(f"blanks must be a number of tokens, at least 1, got {self.blanks!r}")

    def arrange(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks after blanks."""
        return replace(spec, block=True, shared_prefix=False, bos="none", num_ghosts=self.blanks)
