"""What a trainer counts between two lines of its log."""

from __future__ import annotations

from typing import NamedTuple


class Sums(NamedTuple):
    """Sums over batches and ranks since the last log.

    Attributes:
        tokens: Answer tokens.
        correct: Answer tokens that were the likeliest.
        rows: Rows that are no padding.
        total: What is minimised, in nats.
        cross_entropy: In nats.
        divergence: In nats, 0 without a teacher.
        states: Weighted errors, 0 where states are not matched.
    """

    tokens: float = 0.0
    correct: float = 0.0
    rows: float = 0.0
    total: float = 0.0
    cross_entropy: float = 0.0
    divergence: float = 0.0
    states: float = 0.0

    def plus(self, other: Sums) -> Sums:
        """Both together."""
        return Sums(*(own + more for own, more in zip(self, other, strict=True)))

    def means(self, taught: bool) -> dict[str, float]:
        """Per answer token; the parts of the loss only where there are several."""
        if not self.tokens:
            return {}
        names = ("cross_entropy", "divergence", "states") if taught else ()
        means = {name: getattr(self, name) / self.tokens for name in names}
        return {"mean_token_accuracy": self.correct / self.tokens} | means
