"""The outcome of a check, its tolerance, and the requests that methods are checked on."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from blocktune.engine import Engine
from blocktune.models.quantize import quantization_of
from blocktune.prompt import Chunk


@dataclass(frozen=True)
class Ask:
    """A question over chunks; the `Request` of an engine."""

    question: str
    chunks: tuple[Chunk, ...]


ASK = Ask(
    "Who directed it?",
    (
        Chunk("Anna Belt was born in Port Alder.", "Anna Belt"),
        Chunk("She moved to Kirby."),
        Chunk("The film was directed by Noel Fisher.", "Frozen Shore"),
    ),
)
OTHER = Ask("And where was the music written?", ASK.chunks)
SHORT = Ask("Who?", (Chunk("It was shot in 1966."), Chunk("The company is in Lorne.")))
ALONE = Ask("Who directed it?", ASK.chunks[2:])
LAST = Ask(
    ASK.question, (*ASK.chunks[:2], Chunk("The song was written by Walter Green.", "Frozen Lorne"))
)
"""`ASK` with another last chunk of the same length in bytes, which are tokens of `small_engine`."""
HISTORY = (
    Ask("Who was she?", (ASK.chunks[1], ASK.chunks[2], ASK.chunks[0])),
    Ask("Where?", (*SHORT.chunks[::-1], *LAST.chunks[2:])),
)
"""Earlier prompts, for methods that need them: all chunks of the others, in other contexts, none
of them twice."""

RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest accepted difference of logits, as a share of the largest logit. Float32 rounding stays
well below 1e-5 here, and a wrong mask moves logits by more than 1e-2; bfloat16 keeps 8 bits."""
INT8_TOLERANCE = 2e-2
"""The same on an 8-bit base of any dtype: LLM.int8() rounds activations to 8 bits, except columns
chosen over all rows of a pass, so a chunk alone is rounded differently than among others (by 0.005
of the largest logit on small models). 4-bit bases round only weights, once."""


@dataclass(frozen=True)
class Check:
    """The outcome of one claim.

    Attributes:
        name: The claim.
        passed: Whether it holds.
        max_abs_diff: Largest difference of logits.
        tolerance: Largest accepted difference; for the claim that the checks can fail at all, the
            smallest accepted one: a multiple of the other claims' differences.
    """

    name: str
    passed: bool
    max_abs_diff: float
    tolerance: float

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return asdict(self)


def tolerance_of(engine: Engine, logits: Tensor) -> float:
    """Largest accepted difference from ``logits``, at the engine's precision."""
    is_int8 = quantization_of(engine.model) == "int8"
    share = INT8_TOLERANCE if is_int8 else RELATIVE_TOLERANCE[engine.model.dtype]
    return share * max(1.0, float(logits.float().abs().max()))


def is_exact(engine: Engine) -> bool:
    """Whether equal computations differ only by float32 rounding."""
    return engine.model.dtype == torch.float32 and quantization_of(engine.model) != "int8"


def difference(left: Tensor, right: Tensor) -> float:
    """Largest absolute difference."""
    return float((left.float() - right.float()).abs().max())
