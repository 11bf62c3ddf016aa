"""A chunk that stays in its file: layers are read when they are asked for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from blocktune.cache.chunk_file import ChunkFile
from blocktune.cache.chunk_kv import ChunkKV


class FileKV:
    """A chunk whose layers are read from its file each time; read like a `ChunkKV`.

    It is verified once, before: of a file that is damaged after that, `ValueError` comes late.
    """

    kind = ChunkKV.kind

    def __init__(self, file: ChunkFile):
        self.file, self.key, self.like = file, file.key, file.like()
        self.token_ids, self.fingerprint = file.token_ids, file.fingerprint
        self.num_tokens, self.num_bytes = self.like.num_tokens, self.like.num_bytes
        self.num_layers, self.origin = self.like.num_layers, self.like.origin
        self.keys, self.values = _Half(self, "key"), _Half(self, "value")

    matches = ChunkKV.matches

    @classmethod
    def read(cls, file: ChunkFile) -> FileKV | ChunkKV:
        """Of a verified file; the whole entry if it is coded."""
        if file.codec != "as-is":
            return file.entry()
        file.prove()
        return cls(file)

    def to(self, device: torch.device | str) -> FileKV:
        """As it is: layers are read into the CPU's memory."""
        return self

    def tensor(self, name: str) -> Tensor:
        """Of a layer, such as ``key.0``, in new memory."""
        return self.file.read(name)

    def read_into(self, outs: Mapping[str, Tensor]) -> None:
        """See `ChunkFile.read_into`."""
        self.file.read_into(outs)


@dataclass(frozen=True)
class _Half(Sequence):
    kv: FileKV
    name: str

    def __getitem__(self, layer: int) -> Tensor:
        return self.kv.tensor(f"{self.name}.{layer}")

    def __len__(self) -> int:
        return self.kv.num_layers
