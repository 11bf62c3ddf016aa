"""Presets that change how later rows attend to chunks: APE, SEL and PSR."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.methods import (
    Deviation,
    Method,
    Reshape,
    ScaledContext,
    Selection,
    TopChunks,
    register,
    require_one_of,
)
from blocktune.prompt import LayoutSpec


@dataclass(frozen=True)
class _Scale(Method):
    temperature: float = 0.9
    scale: float = 0.9

    def reshape(self) -> Reshape:
        return ScaledContext(temperature=self.temperature, scale=self.scale)


@register("ape")
@dataclass(frozen=True)
class Ape(_Scale):
    """Encodes chunks after a shared prefix at the same positions; scales attention to them.

    Every chunk is encoded after the prompt's prefix, whose keys are kept once, and starts where
    the prefix ends. The question and each answer token attend to the chunks with a temperature and
    a scale. The defaults, 0.9 and 0.9, are those of the authors' code; the paper searches a grid.
    ``positions: sequential`` places the chunks one after another, as the study arXiv:2603.20218.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2502.05431"
    # Attention to the chunk is scaled even if it is alone.
    exact_on_one_chunk: ClassVar[bool] = False
    positions: str = "parallel"

    def __post_init__(self):
        require_one_of("positions", self.positions, ("parallel", "sequential"))

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        spec = replace(spec, placement=self.positions, slot=0)
        return replace(spec, block=True, num_blanks=0, bos="none", shared_prefix=True)


@register("sel")
@dataclass(frozen=True)
class Sel(Method):
    """Encodes chunks after the shared prefix; the question sees only its top-scoring chunks.

    The paper's defaults for retrieved passages: two chunks, scores summed over heads and the
    question's tokens. A single chunk is always seen, so one chunk alone equals full prefill.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2412.16545"
    chunks: int = 2
    aggregation: str = "HT"

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return replace(spec, block=True, num_blanks=0, bos="none", shared_prefix=True)

    def reshape(self) -> Reshape:
        return TopChunks(chunks=self.chunks, aggregation=self.aggregation)


@dataclass(frozen=True)
class _Blanks(Method):
    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    # The chunk was encoded after blanks, which a full prefill does not have.
    exact_on_one_chunk: ClassVar[bool] = False
    blanks: int = 1

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        return replace(spec, block=True, shared_prefix=False, bos="none", num_blanks=self.blanks)


@dataclass(frozen=True)
class _Recompute(Method):
    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    check_layer: int = 1

    def select(self) -> Selection:
        return Deviation(ratio=self.ratio, check_layer=self.check_layer)


@register("psr")
@dataclass(frozen=True)
class Psr(_Scale, _Recompute, _Blanks):
    """Combines blanks before chunks, recomputation by key deviation, and scaled attention.

    Recomputed tokens are not scaled, and attend to reused ones scaled, as the question does. The
    study recomputes 15 % and tunes the rest on a grid without reporting the result: the defaults
    here are one blank, and the temperature and scale of APE's code.
    """

    exact_on_one_chunk: ClassVar[bool] = False


@register("p+s+r")
@dataclass(frozen=True)
class Whole(Psr):
    """PSR under the name that it has among its own ablations: blanks, scale and recompute."""


@register("r")
@dataclass(frozen=True)
class R(_Recompute):
    """PSR's ablation R: recomputes the tokens whose keys deviate most, and nothing else."""


@register("s")
@dataclass(frozen=True)
class S(_Blanks):
    """PSR's ablation S: encodes chunks after blanks that are then dropped, and nothing else.

    The study calls this part S and says that it equals Link0, although it is P in the full name.
    """


@register("s+p")
@dataclass(frozen=True)
class SP(_Scale, _Blanks):
    """PSR's ablation S+P: encodes chunks after blanks and scales attention to them.

    The study describes it as Link0 with APE; chunks stand one after another, as everywhere in it.
    """
