"""A claim, how far off it may be, and the requests that methods are checked on."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from blocktune.engine import Engine
from blocktune.models.quantize import quantization_of
from blocktune.prompt import Chunk


@dataclass(frozen=True)
class Ask:
    """A question over chunks; the engine's `Request`."""

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
"""`ASK` with another last chunk of the same length in bytes, the specimen's tokens."""
HISTORY = (
    Ask("Who was she?", (ASK.chunks[1], ASK.chunks[2], ASK.chunks[0])),
    Ask("Where?", (*SHORT.chunks[::-1], *LAST.chunks[2:])),
)
"""Earlier prompts, for methods that live on them: all chunks of the others, in other contexts, and
none of them twice."""


RELATIVE_TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest accepted difference of logits, as a share of the largest logit. Float32 rounding stays
well under 1e-5 here and a wrong mask moves logits by more than 1e-2; bfloat16 keeps 8 bits."""
INT8_TOLERANCE = 2e-2
"""The same on an 8-bit base, whatever its dtype: LLM.int8() rounds activations to 8 bits and picks
the columns it spares over all rows of a pass, so a chunk alone is rounded otherwise than among
others (0.005 of the largest logit on small models). 4-bit bases round weights only, once."""


@dataclass(frozen=True)
class Check:
    """One claim and how far from it the model is.

    Attributes:
        name: The claim.
        passed: Whether it holds.
        max_abs_diff: Largest difference of logits seen.
        tolerance: Largest difference accepted; for the claim that the checks can fail at all,
            the smallest one wanted: a multiple of what the others differ by.
    """

    name: str
    passed: bool
    max_abs_diff: float
    tolerance: float

    def to_dict(self) -> dict:
        """Plain JSON types."""
        return asdict(self)


def tolerance_of(engine: Engine, logits: Tensor) -> float:
    """Largest accepted difference from ``logits``, by the precision that the engine runs in."""
    is_int8 = quantization_of(engine.model) == "int8"
    share = INT8_TOLERANCE if is_int8 else RELATIVE_TOLERANCE[engine.model.dtype]
    return share * max(1.0, float(logits.float().abs().max()))


def is_exact(engine: Engine) -> bool:
    """Whether two ways to compute the same differ by float32 rounding only."""
    return engine.model.dtype == torch.float32 and quantization_of(engine.model) != "int8"


def difference(left: Tensor, right: Tensor) -> float:
    """Largest absolute difference."""
    return float((left.float() - right.float()).abs().max())
