"""Adjusted F1 of the study, with the bias that its filter has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class AdjustedF1(NamedTuple):
    """Mean F1 over the examples that full prefill does not fail; None when it fails all."""

    mean: float | None
    num_kept: int


class FilterBias(NamedTuple):
    """What the filter of adjusted F1 hides; see `filter_bias`. None where it keeps nothing."""

    bias: float | None
    reverse: float | None


def adjusted_f1(f1: Sequence[float], full_prefill_f1: Sequence[float]) -> AdjustedF1:
    """Mean F1 over the examples on which full prefill scores above zero.

    It asks what reuse loses of what the model could do, and so drops questions that the model
    cannot answer. The filter looks at full prefill's own luck and thus favours it: read it
    beside the raw F1 and `filter_bias`.

    Args:
        f1: The method's F1 per example.
        full_prefill_f1: Full prefill's F1 on the same examples.

    Source: arXiv:2603.20218, evaluation set-up.
    """
    pairs = zip(f1, full_prefill_f1, strict=True)
    kept = [own for own, full in pairs if full > 0]
    return AdjustedF1(sum(kept) / len(kept) if kept else None, len(kept))


def filter_bias(f1: Sequence[float], full_prefill_f1: Sequence[float]) -> FilterBias:
    """How much adjusted F1 understates a method against full prefill, by its filter alone.

    Full prefill has no F1 outside of what the filter keeps; the method may have some, and that is
    dropped. Per kept example, the adjusted gap to full prefill is exactly ``bias`` wider than the
    raw gap.

    Args:
        f1: The method's F1 per example.
        full_prefill_f1: Full prefill's F1 on the same examples.

    Returns:
        ``bias``: F1 that the method earns on dropped examples, per kept one. ``reverse``: full
        prefill's mean F1 where *the method* scores above zero, the same filter turned round.
    """
    pairs = list(zip(f1, full_prefill_f1, strict=True))
    kept = sum(full > 0 for _, full in pairs)
    dropped = sum(own for own, full in pairs if full == 0)
    mirrored = [full for own, full in pairs if own > 0]
    return FilterBias(
        dropped / kept if kept else None, sum(mirrored) / len(mirrored) if mirrored else None
    )
