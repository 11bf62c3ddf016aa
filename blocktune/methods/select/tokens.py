"""Selectors that choose before the forward pass: by place, at random, or by scores of a pass."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import replace
from functools import reduce
from typing import TYPE_CHECKING, ClassVar

from blocktune.methods.select.base import SELECTORS, QueryScores, Selection, selectable
from blocktune.methods.select.budget import chunk_sizes, share_count, top_of_context
from blocktune.registry import require_count, require_one_of, require_share

if TYPE_CHECKING:
    from torch import Tensor

    from blocktune.layout import Layout
    from blocktune.methods.select.base import Passes


@SELECTORS.register("first-k")
class FirstK(Selection):
    """The first ``k`` and the last ``last`` tokens of every chunk, or a share of each chunk."""

    source: ClassVar[str] = "https://arxiv.org/abs/2410.15332"  # both ends: its code, kvlink-a-b
    k: int = 16  # first tokens of each chunk; ignored if ``share`` is given
    share: float | None = None  # share of each chunk's tokens, rounded up, or None
    last: int = 0  # last tokens of each chunk; ignored if ``share`` is given
    last_share: float = 0.0  # part of ``share`` taken from the end of the chunk, in [0, 1]

    def __post_init__(self):
        require_count("k", self.k)
        require_count("last", self.last)
        require_share("share", 0 if self.share is None else self.share)
        require_share("last_share", self.last_share)

    def with_budget(self, ratio: float) -> Selection:
        return replace(self, share=ratio, k=type(self).k, last=type(self).last)

    def spends(self, num_layers: int) -> float | None:
        return self.share

    def start(self, layout: Layout) -> Tensor:
        length, first, last = chunk_length(layout), self.k, self.last
        if self.share is not None:
            total = share_count(length, self.share)
            last = share_count(total, self.last_share)
            first = total - last
        ends = (layout.offset < first) | (layout.offset >= length - last)
        return selectable(layout) & ends


@SELECTORS.register("recency")
class Recency(Selection):
    """The tokens closest to the question."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"  # "selective reconstruction"
    ratio: float = 0.15

    def start(self, layout: Layout) -> Tensor:
        return top_of_context(layout.order, layout, self.ratio)


@SELECTORS.register("random")
class Random(Selection):
    """Random tokens: a lower bound for any choice.

    The draw depends on the seed and on the prompt's layout, but not on other prompts of the batch.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    seed: int = 0

    def start(self, layout: Layout) -> Tensor:
        import torch

        def draw(key: int) -> Tensor:
            generator = torch.Generator().manual_seed((self.seed * 1_000_003 + key) % (1 << 62))
            # Drawn row by row, so that padding does not change the draws of the first rows.
            return torch.rand(layout.num_rows, generator=generator, dtype=torch.float64)

        keys = (layout.is_context * (layout.order + 1) * chunk_length(layout)).sum(1).tolist()
        scores = torch.stack([draw(key) for key in keys]).to(layout.device)
        return top_of_context(scores, layout, self.ratio)


def chunk_length(layout: Layout) -> Tensor:
    """Length in tokens of each row's chunk, ``(B, S)``; 0 outside of chunks."""
    return chunk_sizes(layout.chunk, layout.is_context) * layout.is_context


class Scored(Selection):
    """A selector that first needs scores from a forward pass; subclasses define `begin`."""

    def start(self, layout: Layout) -> Tensor:
        raise ValueError(
            f"selector '{SELECTORS.name_of(self)}' needs a forward pass over a served prompt; in "
            "training, use 'first-k' or 'random'"
        )

    @abstractmethod
    def begin(self, layout: Layout, passes: Passes) -> Tensor: ...


@SELECTORS.register("query-attention")
class QueryAttention(Scored):
    """The tokens that the question attends to most when it is computed over the reused cache.

    Layers (or only the ``last_layers``) are combined by ``fuse``: ``mean``, ``max``, or only the
    ``first`` or the ``last``. With ``each``, every layer chooses the share by its own scores, and a
    token is recomputed up to the last layer that chose it. `Selection` explains ``sees``,
    `QueryScores` the other fields; ``each`` and ``sees`` are from RelaxKV, arXiv:2609.33503.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2602.02579"  # ProphetKV
    needs_question: ClassVar[bool] = True
    ratio: float = 0.15
    fuse: str = "mean"
    last_layers: int | None = None
    over: str = "prompt"
    pool: str = "mean"
    positions: str = "prompt"
    sees: str = "all"

    def __post_init__(self):
        super().__post_init__()
        require_one_of("fuse", self.fuse, ("mean", "max", "first", "last", "each"))
        if self.last_layers is not None:
            require_count("last_layers", self.last_layers, least=1)
        _ = self._how  # checks the other fields

    @property
    def min_layers(self) -> int:
        return self.last_layers or 1

    @property
    def _how(self) -> QueryScores:
        depth = 1 if self.fuse == "first" and self.last_layers is None else None
        return QueryScores(self.over, self.pool, self.positions, depth)

    def spends(self, num_layers: int) -> float | None:
        return {0.0: 0.0, 1.0: 1.0}.get(self.ratio) if self.fuse == "each" else self.ratio

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        every = passes.query_attention(self._how)
        layers = every[-(self.last_layers or 0) :]
        if self.fuse == "each":
            chosen = [top_of_context(scores, layout, self.ratio) for scores in layers]
            first = len(every) - len(layers) + 1
            depths = (choice.long() * (first + i) for i, choice in enumerate(chosen))
            return reduce(lambda a, b: a.maximum(b), depths)
        fused = {"mean": layers.mean(0), "max": layers.amax(0), "last": layers[-1]}
        return top_of_context(fused.get(self.fuse, layers[0]), layout, self.ratio)


@SELECTORS.register("auxiliary-attention")
class AuxiliaryAttention(Scored):
    """Windows of tokens that the question attends to most in the last layer of a small model.

    Windows are consecutive tokens of one chunk, taken by their mean score; the last one taken may
    exceed the ratio. ``model`` is a folder or repository name of a model with the same tokenizer;
    ``self`` is the served model: an upper bound, at the cost of a full prefill.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2510.10129"  # CacheClip
    needs_question: ClassVar[bool] = True
    ratio: float = 0.15
    model: str = "self"
    window: int = 8  # tokens; the last one of a chunk may be shorter

    def __post_init__(self):
        super().__post_init__()
        require_count("window", self.window, least=1)

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        scores, eligible = passes.auxiliary_attention(self.model), selectable(layout)
        per_chunk = int(layout.offset.max()) // self.window + 1
        group = layout.chunk.clamp(min=0) * per_chunk + layout.offset // self.window
        zeros = scores.new_zeros(len(scores), int(group.max()) + 1)
        size = zeros.scatter_add(1, group, eligible.to(scores.dtype))
        mean = zeros.scatter_add(1, group, scores * eligible) / size.clamp(min=1)
        order = mean.argsort(dim=1, descending=True, stable=True)
        sizes = size.gather(1, order)
        wanted = share_count(layout.is_context.sum(1), self.ratio)[:, None]
        taken = sizes.cumsum(1) - sizes < wanted
        # The inverse permutation puts each window's choice back in its place.
        return eligible & taken.gather(1, order.argsort(dim=1)).gather(1, group)


@SELECTORS.register("attention-deviation")
class AttentionDeviation(Scored):
    """The tokens whose first-layer attention changes most when they see the other chunks.

    The source ("selective reconstruction") gives no formula; ours is the total variation between a
    token's attention alone and in context.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        return top_of_context(passes.outside_attention(), layout, self.ratio)


@SELECTORS.register("oracle")
class Oracle(Scored):
    """Tokens chosen with the knowledge of a full prefill: an upper bound for any choice.

    ``by`` is ``influence``, the distance of the true values from the cached ones weighted by the
    question's true attention; ``attention``, that weight alone; or ``deviation``, the distance of
    the true keys and values. Each is summed over the layers.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    needs_question: ClassVar[bool] = True
    ratio: float = 0.15
    by: str = "influence"

    def __post_init__(self):
        super().__post_init__()
        require_one_of("by", self.by, ("influence", "attention", "deviation"))

    def begin(self, layout: Layout, passes: Passes) -> Tensor:
        keys, values, attention = passes.full_prefill()
        scores = {
            "influence": attention * values,
            "attention": attention,
            "deviation": keys + values,
        }[self.by]
        return top_of_context(scores.sum(0), layout, self.ratio)
