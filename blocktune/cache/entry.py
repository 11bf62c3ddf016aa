"""What a store keeps: tensors of one chunk, and what is compared before they are used."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import ClassVar, Self

import torch
from torch import Tensor

Read = Callable[[str], Tensor]
"""Gives the tensor of a name."""


class Entry(ABC):
    """One chunk's tensors of one kind. Tensors are shared: never write into them.

    Class attributes:
        kind: Name of the kind; part of the file's header.

    Attributes:
        token_ids: What was encoded, ``(S,)`` int64.
        fingerprint: Hex digest of the model that encoded it, `model_fingerprint`.
    """

    kind: ClassVar[str]
    token_ids: Tensor
    fingerprint: str

    @abstractmethod
    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors, without the token ids."""

    @abstractmethod
    def facts(self) -> dict[str, int]:
        """What else it takes to `restore` the entry."""

    @classmethod
    @abstractmethod
    def restore(cls, facts: Mapping, read: Read, token_ids: Tensor, fingerprint: str) -> Self:
        """Inverse of `facts` and `tensors`.

        Raises:
            KeyError: If a fact is missing.
            ValueError: If the tensors are no entry of this kind.
        """

    @property
    def num_tokens(self) -> int:
        """Tokens stored."""
        return self.token_ids.shape[0]

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors and the token ids: what it costs to hold or to read."""
        return sum(tensor.nbytes for _, tensor in self.tensors()) + self.token_ids.nbytes

    def matches(self, token_ids: Sequence[int] | Tensor, fingerprint: str) -> bool:
        """Whether this is the state of exactly these tokens under exactly this model."""
        wanted = torch.as_tensor(token_ids, dtype=torch.int64)
        return fingerprint == self.fingerprint and torch.equal(wanted.cpu(), self.token_ids.cpu())

    def to(self, device: torch.device | str) -> Self:
        """Moves the tensors; token ids stay where comparing is cheap, on the CPU."""
        return self._map(lambda tensor: tensor.to(device))

    def compact(self) -> Self:
        """Copies tensors that are views, so that holding a chunk never holds its batch."""
        return self._map(own)

    def _map(self, function: Callable[[Tensor], Tensor]) -> Self:
        tensors = dict(self.tensors())
        ids = own(self.token_ids.cpu())
        return self.restore(self.facts(), lambda n: function(tensors[n]), ids, self.fingerprint)


def own(tensor: Tensor) -> Tensor:
    """The tensor, copied if it is a view or not contiguous."""
    if tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)
