"""Selectors that act between layers: by comparing states with the cache, or by layer range."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.select.base import SELECTORS, LayerKV, Selection, selectable
from blocktune.methods.select.budget import top_by_chunk, top_count, top_share
from blocktune.registry import require_count, require_one_of, require_share

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Layout
    from blocktune.methods.select.base import LayerCheck
    from blocktune.positions import LayerRope

STATES = {"keys": ("keys",), "values": ("values",), "both": ("keys", "values")}
REASON = "at layer 0 keys do not depend on the context yet, so nothing deviates"


def distance(fresh: Tensor, cached: Tensor, squared: bool = False) -> Tensor:
    """Euclidean distance of fresh from cached keys or values, ``(B, K, R, D)``, mean over heads.

    Source: arXiv:2603.20218, section 4.1; ``squared``: the code of CacheBlend and LMCache.
    """
    difference = fresh.float() - cached.float()
    return (difference.square().sum(-1) if squared else difference.norm(dim=-1)).mean(dim=1)


def compared(states: LayerKV, rope: LayerRope) -> LayerKV:
    """What a layer's cached states are compared by.

    DeepSeek caches a latent as keys, and the rotated part of the keys as values: both stand for the
    keys, and the latent for the values.
    """
    import torch

    return LayerKV(torch.cat(states, dim=-1), states.keys) if rope.in_values else states


class _Deviating(Selection):
    """All tokens up to ``check_layer``, then those whose states (``by``) deviate most."""

    by: ClassVar[str] = "keys"
    squared: ClassVar[bool] = False

    def __post_init__(self):
        super().__post_init__()
        require_count("check_layer", self.check_layer, 1, REASON)
        require_one_of("by", self.by, STATES)

    @property
    def min_layers(self) -> int:
        return self.check_layer + 1

    def start(self, layout: Layout) -> Tensor:
        return selectable(layout) & (self.ratio > 0)

    def checks(self, num_layers: int) -> tuple[int, ...]:
        return (self.check_layer,)

    def _share(self, layer: int, num_layers: int) -> float:
        """Share of the context tokens that ``layer`` recomputes, at most 1."""
        return 1.0 if layer < self.check_layer else self.ratio

    def spends(self, num_layers: int) -> float | None:
        shares = (self._share(layer, num_layers) for layer in range(num_layers))
        return sum(shares) / num_layers if self.ratio else 0.0

    def refine(self, check: LayerCheck) -> Tensor:
        share = self._share(check.layer, check.num_layers)
        return top_share(sum(self._distances(check)), check.eligible, check.context_tokens, share)

    def _distances(self, check: LayerCheck) -> list[Tensor]:
        fresh, cached, kinds = check.fresh, check.cached, STATES[self.by]
        return [distance(getattr(fresh, n), getattr(cached, n), self.squared) for n in kinds]


@SELECTORS.register("deviation")
class Deviation(_Deviating):
    """All tokens up to a check layer, then the share whose keys or values deviate most.

    A ratio of 0 recomputes nothing in any layer. The ratio is a share ``of`` the context tokens,
    rounded up, or of all cached tokens with a cached prefix, rounded down (see `compared`).

    Source: CacheBlend arXiv:2405.16444; the defaults are the form of arXiv:2603.20218. Squares and
    ``of=cached``: the code of CacheBlend and LMCache.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2405.16444"
    ratio: float = 0.15  # of the tokens recomputed after the check layer
    check_layer: int = 1  # layer (0-based) at which states are compared
    by: str = "keys"  # ``keys``, ``values`` or ``both``
    squared: bool = False  # square distances before averaging over heads
    of: str = "context"  # or ``cached``
    keeps_keys: bool = False
    sees_future: bool = False

    def __post_init__(self):
        super().__post_init__()
        require_one_of("of", self.of, ("context", "cached"))

    def spends(self, num_layers: int) -> float | None:
        depends = self.of == "cached" and 0 < self.ratio < 1
        return None if depends else super().spends(num_layers)

    def refine(self, check: LayerCheck) -> Tensor:
        if self.of == "context":
            return super().refine(check)
        count = (check.cached_tokens.double() * self.ratio + 1e-9).floor().long()
        return top_count(sum(self._distances(check)), check.eligible, count)


@SELECTORS.register("chunk-probes")
class ChunkProbes(_Deviating):
    """All tokens up to a check layer, then those of each chunk that deviate most.

    With ``by=both``, ``ratio`` of each chunk's tokens, rounded up, are taken by keys and again by
    values, and the union is recomputed: up to twice the ratio. Distances are over all heads.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2607.21604"  # AgentKVShift, algorithm 1
    squared: ClassVar[bool] = True
    ratio: float = 0.1
    check_layer: int = 1
    by: str = "both"

    def spends(self, num_layers: int) -> float | None:
        return {0.0: 0.0, 1.0: 1.0}.get(self.ratio)

    def refine(self, check: LayerCheck) -> Tensor:
        rows = check.eligible, check.chunk, check.eligible
        by_name = [top_by_chunk(d, *rows, self.ratio) for d in self._distances(check)]
        return by_name[0] | by_name[-1]


@SELECTORS.register("gradual-deviation")
class GradualDeviation(_Deviating):
    """Drops, at every layer, the tokens that deviate least among those still recomputed.

    The share falls linearly from ``ratio * (1 + spread)`` after the check layer to
    ``ratio * (1 - spread)`` in the last one, so its mean is ``ratio``. The paper only says that
    the shares fall from slightly above the mean to slightly below; the straight line is ours.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2405.16444"  # CacheBlend, gradual filtering
    keeps_keys: ClassVar[bool] = True  # a layer's states serve that layer and choose for the next
    ratio: float = 0.15  # mean share of the context tokens from the check layer on
    spread: float = 0.2  # relative distance of the first and last share from the mean, in [0, 1]
    check_layer: int = 1  # first layer (0-based) that compares; all below compute in full
    by: str = "both"  # ``keys``, ``values`` or ``both``

    def __post_init__(self):
        super().__post_init__()
        require_share("spread", self.spread)

    def share_at(self, layer: int, num_layers: int) -> float:
        """Share of the context tokens that ``layer`` recomputes, at most 1."""
        if layer < self.check_layer or self.ratio == 1:
            return 1.0
        last = num_layers - 1 - self.check_layer
        at = 2 * (layer - self.check_layer) / last - 1 if last else 0.0
        return min(1.0, self.ratio * (1 - self.spread * at))

    _share = share_at

    def checks(self, num_layers: int) -> tuple[int, ...]:
        return tuple(range(self.check_layer, num_layers))


@SELECTORS.register("layer-range")
class LayerRange(Selection):
    """Every token in a contiguous range of layers, none in the others.

    The first of these layers starts from the chunks' stored hidden states, so its keys and values
    stay as they are.

    Source: DroidSpeak arXiv:2411.02820: on average 11 % of the layers are critical. Measure which
    with `blocktune profile-layers`; the default starts where keys first depend on the context.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2411.02820"
    whole_layers = True
    first_layer: int = 1  # first layer (0-based) of the range
    ratio: float = 0.11  # share of the model's layers in the range, rounded up

    def __post_init__(self):
        super().__post_init__()
        require_count("first_layer", self.first_layer)

    @property
    def min_layers(self) -> int:
        return self.first_layer + 1

    def with_budget(self, ratio: float) -> Selection:
        return replace(self, ratio=ratio, first_layer=0 if ratio == 1 else self.first_layer)

    def layers(self, num_layers: int) -> range:
        """The range in a model of ``num_layers``, cut off at the last one."""
        length = math.ceil(self.ratio * num_layers - 1e-9)
        return range(self.first_layer, min(self.first_layer + length, num_layers))

    def spends(self, num_layers: int) -> float:
        return len(self.layers(num_layers)) / num_layers

    def start(self, layout: Layout) -> Tensor:
        return selectable(layout) & (self.first_layer == 0 and self.ratio > 0)

    def widens(self, num_layers: int) -> tuple[int, ...]:
        return (self.first_layer,) if self.first_layer and self.layers(num_layers) else ()

    def checks(self, num_layers: int) -> tuple[int, ...]:
        layers = self.layers(num_layers)
        return (layers.stop,) if layers and layers.stop < num_layers else ()

    def refine(self, check: LayerCheck) -> Tensor:
        return check.eligible & False


@SELECTORS.register("reselect")
class Reselect(_Deviating):
    """Chooses by key deviation at one layer, and again among all tokens at a deeper one.

    At ``restart_layer`` the dropped tokens come back with the hidden states stored for their
    chunks. The keys of the next layer decide: those of the restart layer equal the cached ones.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"  # DroidSpeak for chunks, section 4.1
    ratio: float = 0.15  # share of the context tokens recomputed after each choice, in [0, 1]
    check_layer: int = 1  # layer (0-based) of the first choice
    restart_layer: int = 5  # layer that is computed for all tokens again

    def __post_init__(self):
        super().__post_init__()
        after = self.check_layer + 1
        require_count("restart_layer", self.restart_layer, after, "after the check layer")

    @property
    def min_layers(self) -> int:
        return self.restart_layer + 2  # keys are compared one layer after the restart

    def _share(self, layer: int, num_layers: int) -> float:
        return 1.0 if layer == self.restart_layer else super()._share(layer, num_layers)

    def checks(self, num_layers: int) -> tuple[int, ...]:
        return (self.check_layer, self.restart_layer + 1)

    def widens(self, num_layers: int) -> tuple[int, ...]:
        return (self.restart_layer,) if self.ratio else ()
