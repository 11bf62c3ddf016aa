"""A forward pass over some rows of the prompt, on a stock model, over a cache of all columns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from blocktune.attention.cached import CachePlan, Reshaping
from blocktune.cache import RowCache
from blocktune.engine.attention_probes import ChunkAttention
from blocktune.engine.cost import Executed
from blocktune.engine.layer_schedule import LayerSchedule, SchedulePlan
from blocktune.engine.rows import Computed
from blocktune.engine.usage import Stopwatch
from blocktune.layout import Kind, Rows


@dataclass
class Prefill:
    """What a prefill gave and what was executed for it.

    Attributes:
        logits: After each prompt's last row, ``(B, V)``.
        plans: The attention plans that ran, each with the layers it ran in.
        probes: Plans of whose rows a layer made keys and values for a choice only, by layer.
        chunk_probe: What rows paid chunks, where that is read; else None.
    """

    logits: Tensor
    plans: list[CachePlan]
    probes: dict[int, CachePlan]
    chunk_probe: ChunkAttention | None = None

    @property
    def chunk_attention(self) -> Tensor:
        """What each column's row paid each chunk, mean over heads and layers, ``(B, N, C)``."""
        return self.chunk_probe.mass / self.chunk_probe.layers

    def layer_tokens(self, num_layers: int) -> Tensor:
        """Context tokens computed in each layer, ``(B, layers)``."""
        counts = torch.zeros(len(self.logits), num_layers, dtype=torch.int64)
        for plan in self.plans:
            for layer in plan.executed:
                counts[:, layer] += plan.context_rows.cpu()
        return counts

    def probed(self) -> Tensor:
        """Context tokens whose states were made for choices only, over all layers, ``(B,)``."""
        none = torch.zeros(len(self.logits), dtype=torch.int64)
        return sum((plan.context_rows.cpu() for plan in self.probes.values()), none)

    def bytes_written(self, cache: RowCache) -> Tensor:
        """Bytes of the keys and values that computing put into the cache, ``(B,)``."""
        total = torch.zeros(len(self.logits), dtype=torch.int64)
        for plan in self.plans:
            rows = (plan.query.kind != Kind.PAD).sum(1).cpu()
            total += rows * sum(cache.bytes_per_column(layer) for layer in plan.executed)
        return total

    def executed(self, model: nn.Module) -> Executed:
        """The same for counting its arithmetic; ``model`` is the one that ran."""
        extra = None if self.chunk_probe is None else self.chunk_probe.multiply_adds
        return Executed(model, self.plans, self.probes, extra=extra)


@torch.no_grad()
def prefill(
    model: nn.Module,
    candidates: Computed,
    columns: Rows,
    cache: RowCache,
    schedule: LayerSchedule,
    watch: Stopwatch,
    reshaping: Reshaping | None = None,
) -> Prefill:
    """Computes rows into the cache, layer by layer, and the logits after the last one.

    Args:
        model: Attached to blocktune's attention, its layers hooked by `layers.install`.
        candidates: The rows that any layer computes.
        columns: Facts of the cache's columns, ``(B, N)``.
        cache: Holds the states of all columns that are not computed.
        schedule: Which of the rows each layer computes.
        watch: Gets ``select_s``, and ``recompute_s`` up to where it chooses.
        reshaping: How rows see reused keys.
    """
    schedule = SchedulePlan(candidates, columns, cache, schedule, watch, reshaping)
    output = model(
        candidates.ids,
        position_ids=candidates.rows.position,
        plan=schedule,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Prefill(output.logits[:, -1], schedule.plans, schedule.probes, schedule.chunk_probe)
