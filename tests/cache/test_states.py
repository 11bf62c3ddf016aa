"""Layer-input states as entries of the store, in both tiers."""

import pytest
import torch
from cache.made import MODEL, OTHER_MODEL, made_chunk

from blocktune.cache import ChunkKV, ChunkStates, ChunkStore, chunk_key, states_key

IDS = torch.arange(5)
KEY = chunk_key(MODEL, IDS)


def made_states(layer=3, dtype=torch.float32):
    states = torch.randn(5, 8, generator=torch.Generator().manual_seed(layer)).to(dtype)
    return ChunkStates(states, layer, IDS, MODEL)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_states_come_back_bit_for_bit_from_either_tier(tmp_path, tier, dtype):
    store = ChunkStore() if tier == "memory" else ChunkStore(max_bytes=0, folder=tmp_path)
    made = made_states(dtype=dtype)
    key = states_key(KEY, 3)
    store.put(key, made)
    found = store.lookup(key, IDS, MODEL, ChunkStates)
    assert (found.tier, found.bytes_read) == (tier, made.num_bytes)
    assert found.kv.layer == 3
    assert torch.equal(found.kv.states, made.states)
    assert found.kv.states.dtype == dtype


def test_every_layer_and_the_chunk_itself_have_keys_of_their_own():
    keys = [KEY, states_key(KEY, 0), states_key(KEY, 1), states_key(chunk_key(MODEL, [1]), 0)]
    assert len(set(keys)) == 4


@pytest.mark.parametrize("tier", ["memory", "disk"])
def test_an_entry_of_another_kind_model_or_text_never_hits(tmp_path, tier, caplog):
    store = ChunkStore() if tier == "memory" else ChunkStore(max_bytes=0, folder=tmp_path)
    key = states_key(KEY, 3)
    store.put(key, made_states())
    store.put(KEY, made_chunk(5))
    assert store.get(key, IDS, MODEL, ChunkKV) is None
    assert store.get(KEY, IDS, MODEL, ChunkStates) is None
    assert store.get(key, IDS, OTHER_MODEL, ChunkStates) is None
    assert store.get(key, IDS + 1, MODEL, ChunkStates) is None
    assert store.stats().rejected == 4
    assert store.get(key, IDS, MODEL, ChunkStates) is not None


def test_states_and_chunks_share_the_memory():
    chunk, states = made_chunk(5), made_states()
    store = ChunkStore(max_bytes=chunk.num_bytes + states.num_bytes)
    store.put(KEY, chunk)
    store.put(states_key(KEY, 3), states)
    assert store.stats().tiers["memory"].evictions == 0
    store.put(states_key(KEY, 4), made_states(4))
    assert store.get(KEY, IDS, MODEL) is None  # it was the oldest
    assert store.get(states_key(KEY, 4), IDS, MODEL, ChunkStates) is not None
