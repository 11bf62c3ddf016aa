"""Of prefix, scale and recompute: blanks alone."""

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.prompt import LayoutSpec
from blocktune.reuse.base import Method, register


@register("s")
@dataclass(frozen=True)
class S(Method):
    """PSR's ablation S: encodes chunks after blanks that are dropped, and nothing else.

    The study calls this part S and says that it equals Link0, though in the whole's name it is P.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    # The chunk follows blanks, which a full prefill does not have.
    exact_on_one_chunk: ClassVar[bool] = False
    blanks: int = 1

    def arrange(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks after blanks."""
        return replace(spec, block=True, shared_prefix=False, bos="none", num_ghosts=self.blanks)
