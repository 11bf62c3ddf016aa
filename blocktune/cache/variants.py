"""Statistics of a chunk's variants: what its tokens attended to in earlier full prompts.

Cache-Craft (arXiv:2502.15734) takes a chunk's keys and values from a full prefill, with the
attention to what stood before it in them. Here such a variant is a chunk encoded after ghosts, the
earlier prompt's tokens, and is stored like any other; this entry says what each depends on.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from blocktune.cache.entry import Entry, Read

Ids = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Variant:
    """One context that a chunk was computed in.

    Attributes:
        prefix: Tokens of the earlier prompt's prefix.
        context: Tokens of the chunks between the prefix and this chunk, in order.
        inter: Attention that the chunk's tokens paid each of these chunks: summed over tokens,
            mean over heads and layers, ``(len(context),)``.
        tokens: Attention that each token paid all of them, ``(S,)``.
        intra: Attention that the tokens paid their own chunk, summed over tokens.
    """

    prefix: Ids
    context: tuple[Ids, ...]
    inter: Tensor
    tokens: Tensor
    intra: float

    @property
    def ghosts(self) -> Ids:
        """All tokens before the chunk, what it was encoded after."""
        return self.prefix + sum(self.context, ())


@dataclass(frozen=True, eq=False)
class ChunkVariants(Entry):
    """All known variants of one chunk, the latest last.

    Attributes:
        variants: At least one.
        token_ids: The chunk's, ``(S,)`` int64.
        fingerprint: Hex digest of the model.

    Raises:
        ValueError: If the statistics are not those of one chunk.
    """

    kind: ClassVar[str] = "variants"
    variants: tuple[Variant, ...]
    token_ids: Tensor
    fingerprint: str

    def __post_init__(self):
        for variant in self.variants:
            shapes = tuple(variant.tokens.shape), tuple(variant.inter.shape)
            if shapes != ((self.num_tokens,), (len(variant.context),)):
                raise ValueError(
                    f"statistics of a chunk of {self.num_tokens} tokens after "
                    f"{len(variant.context)} others must be one number each; got shapes {shapes}"
                )

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `Entry.tensors`."""
        for number, variant in enumerate(self.variants):
            lengths = [len(variant.prefix), *map(len, variant.context)]
            yield f"ghosts.{number}", torch.tensor(variant.ghosts, dtype=torch.int64)
            yield f"lengths.{number}", torch.tensor(lengths)
            yield f"inter.{number}", variant.inter
            yield f"tokens.{number}", variant.tokens
            yield f"intra.{number}", torch.tensor([variant.intra], dtype=torch.float64)

    def facts(self) -> dict[str, int]:
        """See `Entry.facts`."""
        return {"num_variants": len(self.variants)}

    @classmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
        """See `Entry.restore`."""
        numbers = range(int(facts["num_variants"]))
        return cls(tuple(_read_variant(read, n) for n in numbers), token_ids, fingerprint)


def _read_variant(read: Read, number: int) -> Variant:
    ghosts = read(f"ghosts.{number}")
    prefix, *context = ghosts.split(read(f"lengths.{number}").tolist())
    return Variant(
        prefix=tuple(prefix.tolist()),
        context=tuple(tuple(piece.tolist()) for piece in context),
        inter=read(f"inter.{number}"),
        tokens=read(f"tokens.{number}"),
        intra=float(read(f"intra.{number}")),
    )
