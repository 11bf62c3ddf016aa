"""Chunks of known content, small enough to read."""

import torch

from blocktune.cache import ChunkKV

MODEL = "ab" * 32
OTHER_MODEL = "cd" * 32


def made_chunk(num_tokens=5, *, seed=0, dtype=torch.float32, shapes=((2, 4), (1, 6)), **fields):
    """A chunk with tokens ``seed, seed + 1, ..``; layers differ in heads and head dim."""
    random = torch.Generator().manual_seed(seed)

    def states():
        return tuple(
            torch.randn(heads, num_tokens, dim, generator=random).to(dtype) for heads, dim in shapes
        )

    values = {
        "keys": states(),
        "values": states(),
        "token_ids": torch.arange(seed, seed + num_tokens),
        "fingerprint": MODEL,
    }
    return ChunkKV(**values | fields)


def assert_same_chunk(actual, expected):
    assert actual is not None
    assert (actual.fingerprint, actual.origin) == (expected.fingerprint, expected.origin)
    pairs = zip(
        (*actual.keys, *actual.values, actual.token_ids),
        (*expected.keys, *expected.values, expected.token_ids),
        strict=True,
    )
    for one, other in pairs:
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
