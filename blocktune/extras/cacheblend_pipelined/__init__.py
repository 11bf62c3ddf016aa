"""CacheBlend that loads a layer while the layer before is recomputed."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from blocktune.methods import Deviation, Method, Selection, register

if TYPE_CHECKING:
    from blocktune.cache import ChunkStore
    from blocktune.extras.cacheblend_pipelined.loading import LayerLoader


@register("cacheblend-pipelined")
class CacheBlendPipelined(Method):
    """CacheBlend that loads a layer while it computes the one before, and recomputes meanwhile.

    ``ratio`` is the smallest share. Where loading a layer from the folder takes longer than
    recomputing that share of it, the controller recomputes as much as loading hides.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2405.16444"
    ratio: float = 0.15
    check_layer: int = 1

    def select(self) -> Selection:
        return Deviation(ratio=self.ratio, check_layer=self.check_layer)

    def loader(self, store: ChunkStore, fingerprint: str) -> LayerLoader:
        from blocktune.extras.cacheblend_pipelined.loading import LayerLoader, LoadingController

        return LayerLoader(store, LoadingController.of(store, fingerprint))
