"""Prefix, scale and recompute: the study's own design, and its ablations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from blocktune.methods.base import Method, register
from blocktune.methods.reshape import Reshape, ScaledContext
from blocktune.methods.select import Deviation, Selection
from blocktune.prompt import LayoutSpec


@register("psr")
@dataclass(frozen=True)
class Psr(Method):
    """Encodes chunks after blanks, recomputes what deviates most and scales attention to the rest.

    Recomputed tokens are not scaled, and themselves see the reused ones scaled, as the question
    does. The study recomputes 15 % and tunes the rest on a grid without saying what it found: the
    defaults here are one blank, and the temperature and scale of APE's code.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    # The chunk follows blanks and stays scaled, even alone; in a full prefill it does not.
    exact_on_one_chunk: ClassVar[bool] = False
    blanks: int = 1
    ratio: float = 0.15
    check_layer: int = 1
    temperature: float = 0.9
    scale: float = 0.9

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks after blanks."""
        return replace(spec, block=True, shared_prefix=False, bos="none", num_blanks=self.blanks)

    def select(self) -> Selection:
        """Key deviation at the check layer."""
        return Deviation(ratio=self.ratio, check_layer=self.check_layer)

    def reshape(self) -> Reshape:
        """A softmax of their own for reused tokens."""
        return ScaledContext(temperature=self.temperature, scale=self.scale)


@register("p+s+r")
@dataclass(frozen=True)
class Whole(Psr):
    """PSR by the name that it has among its own ablations: blanks, recompute and scale."""


@register("r")
@dataclass(frozen=True)
class R(Method):
    """PSR's ablation R: recomputes the tokens whose keys deviate most, and nothing else."""

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    ratio: float = 0.15
    check_layer: int = 1

    def select(self) -> Selection:
        """Key deviation at the check layer."""
        return Deviation(ratio=self.ratio, check_layer=self.check_layer)


@register("s")
@dataclass(frozen=True)
class S(Method):
    """PSR's ablation S: encodes chunks after blanks that are dropped, and nothing else.

    The study calls this part S and says that it equals Link0, though in the whole's name it is P.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    # The chunk follows blanks, which a full prefill does not have.
    exact_on_one_chunk: ClassVar[bool] = False
    blanks: int = 1

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks after blanks."""
        return replace(spec, block=True, shared_prefix=False, bos="none", num_blanks=self.blanks)


@register("s+p")
@dataclass(frozen=True)
class SP(Method):
    """PSR's ablation S+P: encodes chunks after blanks and scales attention to them.

    Its text says Link0 with APE; chunks stand one after the other, as everywhere in the study.
    """

    source: ClassVar[str] = "https://arxiv.org/abs/2603.20218"
    # The chunk follows blanks and stays scaled, even alone; in a full prefill it does not.
    exact_on_one_chunk: ClassVar[bool] = False
    blanks: int = 1
    temperature: float = 0.9
    scale: float = 0.9

    def layout(self, spec: LayoutSpec) -> LayoutSpec:
        """Chunks after blanks."""
        return replace(spec, block=True, shared_prefix=False, bos="none", num_blanks=self.blanks)

    def reshape(self) -> Reshape:
        """A softmax of their own for the chunks."""
        return ScaledContext(temperature=self.temperature, scale=self.scale)
