"""The cost of an answer: times, bytes and operations, counted where the work is done."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from blocktune.adapter import scope_of
from blocktune.attention.cached import CachePlan
from blocktune.models.gate import decoder_layers
from blocktune.models.small import config_value


@dataclass(frozen=True)
class Ttft:
    """Seconds from request to first token, by stage; for each prompt those of its batch."""

    prompt_s: float = 0.0  # tokenising and laying the prompt out
    lookup_s: float = 0.0  # finding out which chunks are cached
    load_s: float = 0.0  # reading, verifying and moving cached chunks
    encode_s: float = 0.0  # encoding chunks that were not cached (0 when warm)
    relocate_s: float = 0.0  # rotating keys to their positions and joining caches
    select_s: float = 0.0  # selecting tokens to recompute, including passes and probes for that
    recompute_s: float = 0.0  # computing these, the links and the question
    first_token_s: float = 0.0  # picking the first token

    @property
    def total_s(self) -> float:
        """Sum of all stages."""
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True)
class Usage:
    """The cost of one answer."""

    prompt_tokens: int  # tokens of prefix, chunks, links and question
    context_tokens: int  # tokens of chunks
    layer_tokens: tuple[int, ...]  # context tokens computed for the answer, per layer
    probed_tokens: int  # context tokens whose states were computed for selection only
    flops: int  # up to the first token, including passes for selection, without encoding
    bytes_read: int  # bytes of cached keys and values that were loaded into the prompt's cache
    bytes_moved: int  # bytes read from chunk caches, and written into the prompt's cache
    chunk_hits: int  # chunks found in the cache
    chunk_misses: int  # chunks that had to be encoded first
    answer_tokens: int  # tokens decoded
    ttft: Ttft  # times to the first token
    query_entropy: float | None = None  # of the question's attention, in nats, if it is reshaped
    prefix_tokens: int = 0  # tokens of the exact prefix loaded from an earlier prompt
    prefix_disk_tokens: int = 0  # how many of them were read from the store's folder
    recalled: float | None = None  # 1.0: from a response cache; less: a similar question's answer

    @property
    def recompute_ratio(self) -> float:
        """Share of the context's layer-tokens that were computed, in [0, 1]."""
        total = self.context_tokens * len(self.layer_tokens)
        return sum(self.layer_tokens) / total if total else 0.0

    @property
    def ttft_s(self) -> float:
        """Seconds from request to first token."""
        return self.ttft.total_s


@dataclass
class Stopwatch:
    """Adds up seconds by stage. On CUDA it waits for the kernels it is timing."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    _since: float = 0.0

    def start(self) -> None:
        """Begins the next span."""
        self._since = self._now()

    def stop(self, name: str) -> None:
        """Adds the time since the last `start` or `stop` to the stage ``name``."""
        now = self._now()
        self.add(name, now - self._since)
        self._since = now

    def add(self, name: str, seconds: float) -> None:
        """Adds a time that was measured elsewhere."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


OUTPUTS = ("o_proj", "out_proj", "dense", "c_proj", "output_linear")
"""Names of the output projection of attention. Its other projections come before attention."""
EXPANSION = ".kv_b_proj"  # in the name of what makes keys and values of cached latents (DeepSeek)


class LayerCost(NamedTuple):
    """Multiply-adds of one layer."""

    row: int  # of its matrices, per row; in a mixture of experts, of those chosen for a row
    probe: int  # of the projections before a row's keys and values are cached, per row
    column: int  # of the expansion of cached latents (MLA), per column that attention reads


EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")
CHOSEN = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k_experts")
"""Config names for the number of experts in a layer, and of those chosen for a token."""


@dataclass(frozen=True)
class ModelCost:
    """Multiply-adds of a model."""

    layers: tuple[LayerCost, ...]
    head: int  # of the language-model head, per row
    pair: int  # of attention in a layer, per row and key, if all heads have the configured size

    @classmethod
    def of(cls, model: nn.Module) -> ModelCost:
        """Counts the model's modules, once. Norms, activations and rotations are not counted."""
        if (cost := _COSTS.get(model)) is not None:
            return cost
        config = model.config.get_text_config()
        experts, chosen = config_value(config, *EXPERTS), config_value(config, *CHOSEN)
        share = chosen / experts if experts and chosen else 1.0
        heads = config_value(config, "num_attention_heads") or 1  # Mamba has none, and no pairs
        dim = config_value(config, "head_dim") or config.hidden_size // heads
        has_lora = scope_of(model) != "encode"  # such an adapter is inactive when answering
        layers = []
        for layer in decoder_layers(model):
            macs = {n: m for n, m in _matrices(layer, share) if has_lora or ".lora_" not in n}
            column = sum(macs.pop(n) for n in [*macs] if EXPANSION in n)
            attention = [n for n in macs if "attn" in n or "attention" in n]
            before = [macs[n] for n in attention if not set(n.split(".")) & set(OUTPUTS)]
            layers.append(LayerCost(sum(macs.values()), sum(before), column))
        head = config.hidden_size * config.vocab_size
        return _COSTS.setdefault(model, cls(tuple(layers), head, 2 * heads * dim))


_COSTS: WeakKeyDictionary[nn.Module, ModelCost] = WeakKeyDictionary()


@dataclass
class Executed:
    """What one pass of a model computed, to count its operations."""

    model: nn.Module  # the model that ran
    plans: list[CachePlan] = field(default_factory=list)  # each lists the layers it ran in
    probes: Mapping[int, CachePlan] = field(default_factory=dict)  # by layer: for selection only
    heads: int = 1  # rows of each prompt that went through the language-model head
    extra: Tensor | None = None  # further multiply-adds of each prompt, ``(B,)``

    def __post_init__(self):
        for plan in self.plans:
            plan.forget()  # its masks are large, and decoding may take long

    def flops(self) -> Tensor:
        """Floating-point operations, two per multiply-add, ``(B,)`` int64, with masked scores."""
        model = ModelCost.of(self.model)
        macs = model.head * self.heads + (0 if self.extra is None else self.extra)
        for plan in self.plans:
            rows, columns = plan.num_rows(), plan.num_columns()
            for layer, attention in zip(plan.executed, plan.attention_macs(), strict=True):
                cost = model.layers[layer]
                macs = macs + rows * cost.row + columns * cost.column + attention
        for layer, plan in self.probes.items():
            macs = macs + plan.num_rows() * model.layers[layer].probe
        return 2 * macs


def _matrices(layer: nn.Module, share: float) -> Iterator[tuple[str, int]]:
    """Yields module names and multiply-adds per row; experts count with their ``share``."""
    for name, module in layer.named_modules():
        weight = share if "experts" in name.split(".") else 1.0  # all rows pass shared_experts
        if isinstance(module, nn.Linear):  # includes quantised ones, whose weights differ in shape
            yield name, round(module.in_features * module.out_features * weight)
            continue
        own = [p for n, p in module.named_parameters(recurse=False) if not n.endswith("bias")]
        stacked = sum(p.numel() for p in own if p.ndim == 3)  # all experts in one parameter
        plain = sum(p.numel() for p in own if p.ndim == 2)  # a router
        if stacked or plain:
            yield name, plain + round(stacked * share)
