"""Which range of layers is worth recomputing: DroidSpeak's offline profile of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from blocktune.engine.engine import Engine
from blocktune.engine.prompts import Request
from blocktune.methods import build


@dataclass(frozen=True)
class ProfiledRange:
    """One range of layers that was recomputed.

    Attributes:
        first_layer: First of them, 0-based.
        num_layers: How many.
        ratio: Share of the model's layers: with ``first_layer`` the parameters of ``droidspeak``.
        divergence: Nats by which the first answer token's distribution differs from a full
            prefill's (KL from full prefill), mean over the examples.
        agreement: Share of the examples whose likeliest first token is the full prefill's.
        efficient: Whether no range of as few layers diverges less.
    """

    first_layer: int
    num_layers: int
    ratio: float
    divergence: float
    agreement: float
    efficient: bool = False


@torch.no_grad()
def profile_layers(
    engine: Engine,
    examples: Sequence[Request],
    *,
    most_layers: int | None = None,
    batch_size: int = 8,
    progress: Callable[[list[tuple[int, int]]], Iterator[tuple[int, int]]] = iter,
) -> list[ProfiledRange]:
    """Tries every contiguous range of layers on held-out examples: O(layers squared) passes.

    Args:
        engine: Its model is profiled.
        examples: Not of the split that results are reported on.
        most_layers: Longest range tried; None: all lengths.
        batch_size: Prompts served together.
        progress: Wraps the list of ranges ``(first, length)`` to try.

    Returns:
        The ranges by length, then first layer; the efficient ones are marked.

    Raises:
        ValueError: If there is no example, or ``most_layers`` is out of range.

    Source: DroidSpeak arXiv:2411.02820, offline profiling. Its quality is a task's score; here it
    is how far the model's next token is from a full prefill's, which needs fewer examples.
    """
    depth = engine.prompts.num_layers
    longest = depth if most_layers is None else most_layers
    if not examples or not 1 <= longest <= depth:
        raise ValueError(
            f"profiling wants examples and ranges of 1 to {depth} layers; got {len(examples)} "
            f"examples and at most {longest} layers"
        )
    full = _first_tokens(engine, examples, build("full-prefill"), batch_size)
    ranges = [(first, n) for n in range(1, longest + 1) for first in range(depth - n + 1)]
    tried = []
    for first, length in progress(ranges):
        method = build("droidspeak", first_layer=first, ratio=length / depth)
        served = _first_tokens(engine, examples, method, batch_size)
        divergence = float((full.exp() * (full - served)).sum(-1).mean())
        agreement = float((full.argmax(-1) == served.argmax(-1)).float().mean())
        tried.append(ProfiledRange(first, length, length / depth, divergence, agreement))
    least = {n: min(one.divergence for one in tried if one.num_layers <= n) for _, n in ranges}
    return [replace(one, efficient=one.divergence <= least[one.num_layers]) for one in tried]


def _first_tokens(engine: Engine, examples, method, batch_size: int) -> torch.Tensor:
    """Log-probabilities of each example's first answer token, ``(examples, V)`` float32."""
    starts = range(0, len(examples), batch_size)
    logits = [engine.next_logits(examples[a : a + batch_size], method) for a in starts]
    return torch.cat(logits).float().log_softmax(-1).cpu()
