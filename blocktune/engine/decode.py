"""From the first logits to text: greedy or sampled, batched, a token at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from blocktune.attention.cached import CachePlan, Reshaping
from blocktune.cache import RowCache
from blocktune.engine.rows import decoded_rows
from blocktune.layout import Rows

Pick = Callable[[Tensor], Tensor]
"""From logits ``(B, V)`` to tokens ``(B, 1)``."""


@dataclass(frozen=True)
class Sampling:
    """How the next token is picked. The default is greedy.

    Attributes:
        temperature: 0 is greedy; above, logits are divided by it.
        top_k: Keep this many of the likeliest tokens; 0 keeps all.
        top_p: Keep the likeliest tokens up to this much probability.
        seed: Of the draws; the same seed gives the same answers, in batches of any size.

    Raises:
        ValueError: If a value is out of range.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature < 0:
            raise ValueError(f"temperature must be at least 0 (greedy), got {self.temperature}")
        if self.top_k < 0:
            raise ValueError(f"top_k must be at least 0 (all tokens), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")

    def picker(self, device: torch.device, streams: Sequence[int]) -> Pick:
        """A function from logits ``(B, V)`` to tokens ``(B, 1)``.

        Args:
            device: Of the logits.
            streams: One number per prompt. Prompts draw independently, each the same from the same
                seed and number, whatever stands beside it in the batch.
        """
        if self.temperature == 0:
            return lambda logits: logits.argmax(-1, keepdim=True)
        warpers = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(float(self.top_p)))
        seeds = [(self.seed * 1_000_003 + stream) % (1 << 63) for stream in streams]
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

        def draw(logits: Tensor) -> Tensor:
            weights = torch.softmax(warpers(None, logits.float()), dim=-1)
            rows = zip(weights, generators, strict=True)
            return torch.stack([torch.multinomial(row, 1, generator=g) for row, g in rows])

        return draw


@torch.no_grad()
def decode(
    model: nn.Module,
    cache: RowCache,
    columns: Rows,
    last: Rows,
    logits: Tensor,
    pick: Pick,
    max_new_tokens: int,
    stop_ids: frozenset[int],
    reshaping: Reshaping | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields one token per prompt and step, ``(B,)``, -1 for prompts that have ended.

    Each comes with the logits ``(B, V)`` that it was picked by.

    Ends when all prompts have produced a stop token (which is yielded), or after
    ``max_new_tokens``. Columns for the new tokens are appended to ``cache``.

    Args:
        model: Attached to blocktune's attention.
        cache: After the prefill.
        columns: Facts of its columns, ``(B, N)``.
        last: Facts of each prompt's last row, ``(B, 1)``.
        logits: After those rows, ``(B, V)``.
        pick: From logits ``(B, V)`` to tokens ``(B, 1)``, `Sampling.picker`.
        max_new_tokens: At least 1.
        stop_ids: Tokens that end an answer.
        reshaping: How rows see reused keys, as in the prefill.
    """
    rows = decoded_rows(last, max_new_tokens)
    keys = columns.concat(rows)
    stops = torch.tensor(sorted(stop_ids), device=logits.device)
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    for step in range(max_new_tokens):
        token = pick(logits)
        yield token[:, 0].masked_fill(ended, -1), logits
        ended |= torch.isin(token[:, 0], stops)
        if step + 1 == max_new_tokens or bool(ended.all()):
            return
        cache.append()
        query = rows.map(lambda field, step=step: field[:, step : step + 1])
        seen = keys.map(lambda field: field[:, : cache.num_columns])
        output = model(
            token,
            position_ids=query.position,
            plan=CachePlan(query, seen, reshaping),
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
