"""Presets that recompute some tokens of the chunks; each decides the axis select."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar

from blocktune.methods import Method, Repair, Selection, register, require_one_of
from blocktune.methods import repair as repairs
from blocktune.methods import select as selectors
from blocktune.methods.base import encoded_alone
from blocktune.prompt import LayoutSpec


class _Recompute(Method):
    """A method whose parameters are those of its ``selector``."""

    selector: ClassVar[Callable[..., Selection]]

    def select(self) -> Selection:
        return self.selector(**vars(self))


@register("epic")
class Epic(_Recompute):
    """Recomputes the first tokens of every chunk, which removes the chunk's own attention sink.

    See `FirstK`; its ``share`` is for equal budgets, as in arXiv:2603.20218. The authors' scripts,
    but not the paper, also put a BOS before every chunk and the question: ``bos: keep-all``.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2410.15332"
    selector = selectors.FirstK
    k: int = 16
    share: float | None = None
    last: int = 0
    last_share: float = 0.0


@register("cacheblend")
class CacheBlend(_Recompute):
    """Computes layer 0 in full, then only the tokens whose keys deviate most at layer 1.

    This is the form of arXiv:2603.20218: one selection at ``check_layer`` for all later layers.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2405.16444"
    selector = selectors.Deviation
    ratio: float = 0.15
    check_layer: int = 1


@register("cacheblend-lmcache")
class CacheBlendLMCache(_Recompute):
    """CacheBlend as in LMCache's sparse path: squared key distance, and the share rounded down.

    The share is of all tokens that come from caches, with a cached prefix. The mask is causal;
    ``cacheblend-lmcache-flash`` has that of LMCache's other path. LMCache stores a chunk as it
    first appeared inside some prompt (issue 922 of the repository); here it is encoded alone.
    """

    source: ClassVar[str] = "https://github.com/LMCache/LMCache"
    selector = staticmethod(partial(selectors.Deviation, squared=True, of="cached"))
    ratio: float = 0.15
    check_layer: int = 1


@register("cacheblend-lmcache-flash")
class CacheBlendLMCacheFlash(CacheBlendLMCache):
    """CacheBlend as in LMCache's FlashAttention path, where recomputed tokens see later ones.

    As ``cacheblend-lmcache``, but with the mask of a causal kernel that treats the selected tokens
    as the last of the prompt (issue 1152 of the repository): to reproduce, not to serve with.
    """

    selector = staticmethod(
        partial(selectors.Deviation, squared=True, of="cached", sees_future=True)
    )


@register("cacheblend-paper")
class CacheBlendPaper(_Recompute):
    """CacheBlend as in the paper: drops the least deviating tokens again at every layer."""

    source: ClassVar[str] = "https://arxiv.org/abs/2405.16444"
    selector = selectors.GradualDeviation
    ratio: float = 0.15
    spread: float = 0.2
    check_layer: int = 1


@register("cacheblend-repo")
class CacheBlendRepo(_Recompute):
    """CacheBlend as in the authors' code: selects by squared value distance at layer 1.

    The share is of prefix and chunks, rounded down. ``sees_future`` reproduces the code's mask, by
    which a recomputed token sees tokens after it (issue 21 of the repository); do not serve with
    it. Not reproduced: question tokens that compete for the share in some of its scripts; ignored
    sliding windows; a BOS before every chunk whose own state is dropped (``layout: {bos: drop}``).
    """

    source: ClassVar[str] = "https://github.com/YaoJiayi/CacheBlend"
    selector = staticmethod(
        partial(selectors.Deviation, by="values", squared=True, of="cached", keeps_keys=True)
    )
    ratio: float = 0.16
    check_layer: int = 1
    sees_future: bool = False


@register("droidspeak")
class DroidSpeak(_Recompute):
    """Recomputes all tokens in one range of layers, from stored activations, and none elsewhere.

    See `LayerRange`. The paper reuses the cache of another model; here it is the chunks' own.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2411.02820"
    selector = selectors.LayerRange
    first_layer: int = 1
    ratio: float = 0.11


@register("droidspeak-clc")
class DroidSpeakCLC(_Recompute):
    """Selects tokens by key deviation at layer 1, and again among all tokens at a deeper layer."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    selector = selectors.Reselect
    ratio: float = 0.15
    check_layer: int = 1
    restart_layer: int = 5


@register("query-attention")
class QueryAttentionMethod(_Recompute):
    """Computes the question over the reused cache, then recomputes the tokens it attends to.

    This is the general form of ``prophetkv``, ``infoflow``, ``a3`` and ``relaxkv``.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2602.02579"
    selector = selectors.QueryAttention
    ratio: float = 0.2
    fuse: str = "mean"
    last_layers: int | None = None
    over: str = "prompt"
    pool: str = "mean"
    positions: str = "prompt"
    sees: str = "all"


@register("prophetkv")
class ProphetKV(_Recompute):
    """Recomputes the tokens that the question attends to most, mean over all layers.

    Weights are over cached tokens. The paper averages over the words of the question alone; here
    all rows after the chunks count.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2602.02579"
    selector = staticmethod(partial(selectors.QueryAttention, over="cached"))
    ratio: float = 0.2


@register("infoflow")
class InfoFlow(_Recompute):
    """Recomputes the tokens that single rows of the question attend to, in the last two layers.

    A token's score is the Euclidean norm, over the question's rows, of its attention weight (mean
    over heads). Keys are scored at their positions in the prompt, which is the paper's point; for
    comparison, ``positions=encoded`` scores them where each chunk was encoded. The paper's code
    scores by the words of the question alone; here all rows after the chunks count. Its share is of
    prefix and chunks, rounded down to at least one token; here of the chunks, rounded up.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.05353"
    selector = staticmethod(partial(selectors.QueryAttention, pool="norm"))
    ratio: float = 0.15
    last_layers: int = 2
    positions: str = "prompt"


@register("a3")
class A3(_Recompute):
    """Recomputes the tokens that the question attends to most in the first layer.

    Weights are over the chunks' tokens alone. The published code computes the first layer for all
    tokens, whose keys and values there do not depend on the context, and rounds the share down;
    here only the chosen ones are computed, and it is rounded up.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2511.17560"
    selector = staticmethod(partial(selectors.QueryAttention, fuse="first", over="chunks"))
    ratio: float = 0.15


@register("relaxkv")
class RelaxKV(_Recompute):
    """Recomputes what each layer's question attends to, and lets it see only what is recomputed.

    Each layer chooses ``ratio``, so more than that of the layer-tokens are recomputed.
    No code is public. Here the prompt's prefix stays visible, and hidden scores are computed and
    masked, so that attending to less does not save time.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2609.33503"
    selector = staticmethod(partial(selectors.QueryAttention, fuse="each"))
    ratio: float = 0.15
    sees: str = "chosen"


@register("agentkvshift")
class AgentKVShift(Method):
    """Recomputes the tokens of each chunk that deviate most; moves the others by the mean change.

    ``ratio`` of a chunk's tokens are recomputed by keys, and as many by values. Layers up to
    ``check_layer`` are computed in full, since all tokens are compared there. To change the budget,
    set ``ratio``: a budget in percent does not change the repair's ``share``.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2607.21604"
    ratio: float = 0.1
    check_layer: int = 1

    def select(self) -> Selection:
        return selectors.ChunkProbes(ratio=self.ratio, check_layer=self.check_layer)

    def repair(self) -> Repair:
        return repairs.MeanShift(share=self.ratio)


@register("cacheclip")
class CacheClip(Method):
    """Recomputes windows of tokens that the question attends to in a small auxiliary model.

    Chunks are encoded after the whole prefix of the prompt (in arXiv:2603.20218, after 1 to 10 of
    its tokens). ``auxiliary`` is the model, such as Llama-3.2-1B for Llama-3.1-8B, or Qwen3-0.6B
    for Qwen3-8B; see `AuxiliaryAttention`.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2510.10129"
    ratio: float = 0.2
    auxiliary: str = "self"
    window: int = 8

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return encoded_alone(spec, shared_prefix=True)

    def select(self) -> Selection:
        return selectors.AuxiliaryAttention(self.ratio, self.auxiliary, self.window)


@register("selective-reconstruction")
class SelectiveReconstruction(Method):
    """Recomputes tokens whose first-layer attention changes in context, or the most recent ones."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    impact: str = "attention"

    def select(self) -> Selection:
        kinds = {"attention": selectors.AttentionDeviation, "recency": selectors.Recency}
        require_one_of("impact", self.impact, kinds)
        return kinds[self.impact](ratio=self.ratio)


@register("oracle")
class OracleMethod(_Recompute):
    """Recomputes the tokens that matter most according to a full prefill run beforehand."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    selector = selectors.Oracle
    ratio: float = 0.15
    by: str = "influence"


@register("random")
class RandomMethod(_Recompute):
    """Recomputes random tokens: what any other choice must beat."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    selector = selectors.Random
    ratio: float = 0.15
    seed: int = 0
