"""The upper bound of what a choice of tokens is worth."""

from dataclasses import dataclass
from typing import ClassVar

from blocktune.reuse.base import Method, register
from blocktune.select import Oracle, Selection


@register("oracle")
@dataclass(frozen=True)
class OracleMethod(Method):
    """Recomputes the tokens that a full prefill, run first, shows to matter: no method knows more.

    ``by`` says what matters: ``influence``, ``attention`` or ``deviation``.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    by: str = "influence"

    def selection(self) -> Selection:
        """With a full prefill's knowledge."""
        return Oracle(ratio=self.ratio, by=self.by)
