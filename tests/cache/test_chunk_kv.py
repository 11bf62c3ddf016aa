import pytest
import torch
from cache.made import MODEL, OTHER_MODEL, made_chunk

from blocktune.cache import ChunkKV


def test_sizes_are_counted_from_the_tensors():
    kv = made_chunk(5, shapes=((2, 4), (1, 6)), dtype=torch.bfloat16, origin=3)
    assert (kv.num_tokens, len(kv.keys), kv.dtype, kv.origin) == (5, 2, torch.bfloat16, 3)
    # Keys and values, 5 tokens, (2 heads x 4 + 1 head x 6) numbers of 2 bytes; 5 ids of 8 bytes.
    assert kv.num_bytes == 2 * 5 * (2 * 4 + 1 * 6) * 2 + 5 * 8


def test_matches_wants_the_same_tokens_and_the_same_model():
    kv = made_chunk(3)
    assert kv.matches([0, 1, 2], MODEL)
    assert kv.matches(torch.tensor([0, 1, 2]), MODEL)
    assert not kv.matches([0, 1, 3], MODEL)
    assert not kv.matches([0, 1], MODEL)
    assert not kv.matches([0, 1, 2], OTHER_MODEL)


def test_compact_lets_go_of_the_batch_it_was_cut_from():
    batch = torch.randn(1, 4, 100, 8)
    kv = ChunkKV((batch[0, :, 10:13],), (batch[0, :, 20:23],), torch.tensor([1, 2, 3]), MODEL)
    own = kv.compact()
    assert kv.keys[0].untyped_storage().nbytes() == 4 * 100 * 8 * 4
    assert own.keys[0].untyped_storage().nbytes() == 4 * 3 * 8 * 4
    assert torch.equal(own.keys[0], batch[0, :, 10:13])
    assert torch.equal(own.values[0], batch[0, :, 20:23])
    assert own.compact().keys[0] is own.keys[0]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"keys": ()}, r"keys and values, .* got \(2, 5, 4\)"),
        ({"keys": (), "values": ()}, "keys and values, .* got $"),
        ({"token_ids": torch.arange(5, dtype=torch.int32)}, r"int64 row.*got \(5,\) torch.int32"),
        ({"token_ids": torch.arange(5)[None]}, r"got \(1, 5\)"),
        ({"token_ids": torch.arange(4)}, r"4 tokens; got \(2, 5, 4\)"),
        ({"token_ids": torch.arange(0)}, "at least one token"),
        ({"fingerprint": "Llama"}, "hex digest .* got 'Llama'"),
        ({"origin": -1}, "origin >= 0; got .* -1"),
        ({"values": (torch.zeros(2, 5, 4), torch.zeros(1, 4, 6))}, r"\(1, 4, 6\)"),
        ({"values": (torch.zeros(2, 5, 4), torch.zeros(5, 6))}, r"got .*\(5, 6\)"),
        ({"values": (torch.zeros(2, 5, 4), torch.zeros(1, 5, 6).half())}, "torch.float16"),
        ({"keys": (torch.zeros(2, 5, 4).long(), torch.zeros(1, 5, 6))}, "got .* torch.int64"),
    ],
)
def test_what_is_not_one_chunk_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        made_chunk(5, **fields)
