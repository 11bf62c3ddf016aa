"""One chunk in one safetensors file: written whole or not at all, verified when read."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from blocktune.cache.chunk_kv import ChunkKV
from blocktune.cache.fingerprint import CACHE_FORMAT

WRITING = ".writing"
"""Folder inside a store for files not finished yet; same file system, so renaming is atomic."""
_ABANDONED_S = 3600
_KEY = re.compile(r"[0-9a-f]{64}")


def chunk_path(folder: Path, key: str) -> Path:
    """Where a chunk lies: two levels of folders, so that none grows beyond what tools can list.

    Raises:
        ValueError: If the key is not one that `chunk_key` makes.
    """
    if not _KEY.fullmatch(key):
        raise ValueError(f"a chunk key is 64 hex digits, see `chunk_key`; got {key!r}")
    return folder / key[:2] / key[2:4] / f"{key}.safetensors"


def open_folder(folder: Path) -> None:
    """Makes the folder of a store, checks that it can be written, removes abandoned writes.

    Raises:
        ValueError: If it cannot be made or written.
    """
    try:
        writing = folder / WRITING
        writing.mkdir(parents=True, exist_ok=True)
        probe = writing / uuid.uuid4().hex
        probe.touch()
        probe.unlink()
        for file in writing.iterdir():
            if time.time() - file.stat().st_mtime > _ABANDONED_S:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"cannot use '{folder}' as a chunk store: {error.strerror or error}; "
            "name a folder that can be written"
        ) from None


def write_chunk(folder: Path, key: str, kv: ChunkKV) -> int:
    """Writes a chunk so that readers see the old file, none, or the whole new one.

    Several processes may write the same key at once: each writes a file of its own, the last
    rename stays.

    Returns:
        Bytes written.

    Raises:
        ValueError: If the disk refuses; nothing is left behind.
    """
    path, kv = chunk_path(folder, key), kv.to("cpu").compact()
    unfinished = folder / WRITING / f"{key[:16]}-{os.getpid()}-{uuid.uuid4().hex}"
    metadata = _header(key, kv) | {"checksum": _checksum(key, kv)}
    data = save(dict(_tensors(kv)), metadata=metadata)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
        _sync_folder(path.parent)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise ValueError(
            f"cannot write chunk {key[:12]} to '{folder}': {error.strerror or error}; "
            "free space there or choose another store"
        ) from None
    return len(data)


def read_chunk(folder: Path, key: str) -> ChunkKV:
    """Reads one chunk into memory of its own and verifies every bit of it.

    Returns:
        The chunk, on the CPU.

    Raises:
        FileNotFoundError: If there is no such chunk.
        ValueError: If the file is not what was written under this key; says why.
    """
    path = chunk_path(folder, key)
    try:
        kv, header = _load(path)
    except FileNotFoundError:
        raise
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise ValueError(f"unreadable ({error})") from None
    checksum = header.pop("checksum", None)
    if header != _header(key, kv):
        raise ValueError("its header names another chunk or cache format")
    if checksum != _checksum(key, kv):
        raise ValueError("its contents do not match its checksum")
    return kv


def _load(path: Path) -> tuple[ChunkKV, dict[str, str]]:
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata() or {})
        layers = range(int(header["num_layers"]))

        def copy(name: str) -> Tensor:
            # Out of the mapping: what is verified must be what is used, whatever happens to the
            # file later.
            return file.get_tensor(name).clone()

        kv = ChunkKV(
            keys=tuple(copy(f"key.{layer}") for layer in layers),
            values=tuple(copy(f"value.{layer}") for layer in layers),
            token_ids=copy("token_ids"),
            fingerprint=header["fingerprint"],
            origin=int(header["origin"]),
        )
    return kv, header


def _header(key: str, kv: ChunkKV) -> dict[str, str]:
    return {
        "format": f"blocktune chunk {CACHE_FORMAT}",
        "key": key,
        "fingerprint": kv.fingerprint,
        "num_tokens": str(kv.num_tokens),
        "num_layers": str(kv.num_layers),
        "origin": str(kv.origin),
    }


def _tensors(kv: ChunkKV) -> Iterator[tuple[str, Tensor]]:
    for layer, (key, value) in enumerate(zip(kv.keys, kv.values, strict=True)):
        yield f"key.{layer}", key
        yield f"value.{layer}", value
    yield "token_ids", kv.token_ids


def _checksum(key: str, kv: ChunkKV) -> str:
    digest = hashlib.sha256(json.dumps(_header(key, kv), sort_keys=True).encode())
    for name, tensor in _tensors(kv):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(memoryview(tensor.view(torch.uint8).numpy()).cast("B"))
    return digest.hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
