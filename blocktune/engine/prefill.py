"""A forward pass over some rows of the prompt, on a stock model, over a cache of all columns."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from blocktune.attention.cached import CachePlan
from blocktune.cache import RowCache
from blocktune.engine.rows import Computed, left_padded
from blocktune.layout import Kind, Rows
from blocktune.select import Selection


@dataclass
class Prefill:
    """What a prefill gave and what was executed for it.

    Attributes:
        logits: After each prompt's last row, ``(B, V)``.
        plans: The attention plans that ran, each with the layers it ran in.
        probed: Context tokens of each prompt of which only keys were made, ``(B,)``.
        select_s: Seconds spent on choosing tokens.
    """

    plans: list[CachePlan]
    probed: Tensor
    logits: Tensor | None = None
    select_s: float = 0.0

    def layer_tokens(self, num_layers: int) -> Tensor:
        """Context tokens computed in each layer, ``(B, layers)``."""
        counts = torch.zeros(len(self.probed), num_layers, dtype=torch.int64)
        for plan in self.plans:
            for layer in plan.executed:
                counts[:, layer] += plan.context_rows.cpu()
        return counts


@torch.no_grad()
def prefill(
    model: nn.Module,
    computed: Computed,
    columns: Rows,
    cache: RowCache,
    selection: Selection,
    context_tokens: Tensor,
) -> Prefill:
    """Computes rows into the cache, layer by layer, and the logits after the last one.

    Args:
        model: Attached to blocktune's attention.
        computed: The rows to compute in the first layer.
        columns: Facts of the cache's columns, ``(B, N)``.
        cache: Holds the states of all columns that are not computed.
        selection: Narrows the rows at its check layer, if it has one.
        context_tokens: Of each prompt, ``(B,)``.
    """
    plan = CachePlan(computed.rows, columns)
    result = Prefill(plans=[plan], probed=torch.zeros_like(context_tokens))
    cache.select(computed.columns)
    narrowing = _Narrowing(computed, columns, cache, selection, context_tokens, result)
    with narrowing.hooked(decoder_layers(model)):
        output = model(
            computed.ids,
            position_ids=computed.rows.position,
            plan=plan,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    result.logits = output.logits[:, -1]
    return result


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers, through a PEFT wrapper or not."""
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if name.endswith("layers") and isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of {depth} decoder layers to hook into; "
        "selective recomputation is not available for it"
    )


class _KeysSeen(Exception):
    """Ends a layer's forward once its keys are made: nothing else of it is wanted."""

    def __init__(self, fresh: Tensor, cached: Tensor):
        self.fresh, self.cached = fresh, cached


@dataclass
class _Narrowing:
    """From the check layer on, a stock model is fed only the rows that stay fresh."""

    computed: Computed
    columns: Rows
    cache: RowCache
    selection: Selection
    context_tokens: Tensor
    result: Prefill
    _plan: CachePlan | None = None
    _index: Tensor | None = None
    _kept: dict = field(default_factory=dict)

    @contextmanager
    def hooked(self, layers: nn.ModuleList) -> Iterator[None]:
        """Hooks the layers from the check layer on for the time of the block."""
        check = self.selection.check_layer
        if check is None:
            yield
            return
        hooks = [layers[check].register_forward_pre_hook(self._narrow, with_kwargs=True)]
        for layer in layers[check + 1 :]:
            hooks.append(layer.register_forward_pre_hook(self._replace, with_kwargs=True))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _narrow(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """At the check layer: makes keys of all rows, chooses, and drops the other rows."""
        check = self.selection.check_layer
        fresh, cached = self._probe(layer, args, kwargs)
        started = time.perf_counter()
        rows = self.computed.rows
        eligible = rows.kind == Kind.CHUNK
        keep = self.selection.refine(fresh, cached, eligible, self.context_tokens)
        keep = (keep & eligible) | ((rows.kind != Kind.PAD) & ~eligible)
        self._index, exists = left_padded(keep, rows.order)
        chosen = self.computed.take(self._index, exists)
        self._plan = CachePlan(chosen.rows, self.columns)
        self.cache.select(chosen.columns, range(check, len(self.cache)))
        self.result.plans.append(self._plan)
        self.result.probed = eligible.sum(1)
        self.result.select_s += time.perf_counter() - started
        hidden = self._pick(args[0])
        return self._replace(layer, (hidden, *args[1:]), kwargs)

    def _probe(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[Tensor, Tensor]:
        def stop(index: int, fresh: Tensor, cached: Tensor) -> None:
            raise _KeysSeen(fresh, cached)

        check = self.selection.check_layer
        self.cache.observe(check, stop)
        try:
            layer.forward(*args, **kwargs)
        except _KeysSeen as seen:
            return seen.fresh, seen.cached
        finally:
            self.cache.observe(check, None)
        raise AssertionError(f"layer {check} never updated its cache")

    def _replace(self, layer: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """What the model passes to every layer was made for all rows: picks those that stay."""
        kwargs = dict(kwargs, plan=self._plan)
        for name in ("position_embeddings", "position_ids"):
            if kwargs.get(name) is not None:
                kwargs[name] = self._picked(kwargs[name])
        return args, kwargs

    def _picked(self, value: Tensor | tuple) -> Tensor | tuple:
        # Layers share these tensors: each is picked once (and held, so that ids stay unique).
        if id(value) not in self._kept:
            is_pair = isinstance(value, tuple)
            new = tuple(map(self._pick, value)) if is_pair else self._pick(value)
            self._kept[id(value)] = (value, new)
        return self._kept[id(value)][1]

    def _pick(self, tensor: Tensor) -> Tensor:
        """Rows ``(B, R, ...)`` to those that stay, ``(B, R', ...)``."""
        index = self._index.view(*self._index.shape, *[1] * (tensor.ndim - 2))
        return tensor.gather(1, index.expand(*self._index.shape, *tensor.shape[2:]))
