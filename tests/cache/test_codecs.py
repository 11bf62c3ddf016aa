"""Codecs: errors and bytes, files equal to what was handed out, keys before their rotation."""

import json
from functools import partial

import pytest
import torch
from cache.made import MODEL, assert_same_chunk, made_chunk
from engine.served import ASK, engine_of
from families import FAMILIES

from blocktune.bench.store import codec_error
from blocktune.cache import ChunkStates, ChunkStore, chunk_key, states_key
from blocktune.cache.store import chunk_file
from blocktune.cache.store.chunk_file import ChunkFile
from blocktune.cache.store.codecs import round_trip
from blocktune.cache.store.config import CODECS, StoreConfig
from blocktune.cache.store.folder import OpenFile
from blocktune.positions import LayerRope, RopeSpec
from blocktune.positions.relocation import relocate_keys

LOSSY = [codec for codec in CODECS if codec != "as-is"]
SHAPES = ((2, 64), (1, 24))
STILL = LayerRope(torch.empty(0))
TURNING = LayerRope(1e2 ** -(torch.arange(32) / 32))
ROPE = RopeSpec((TURNING, STILL))
BOUNDS = {"as-is": (0, 0), "fp8": (0.04, 0.04), "int8": (0.01, 0.01), "int4": (0.12, 0.12)}
BYTES = {"as-is": 1.0, "fp8": 0.51, "int8": 0.6, "int4": 0.4}


def rotated(num_tokens=100, dtype=torch.bfloat16, origin=3):
    """A chunk as a model makes it: channels with offsets of very different size, then rotation."""
    kv = made_chunk(num_tokens, shapes=SHAPES, origin=origin)
    size = torch.logspace(-1, 1, 64)
    positions = torch.arange(origin, origin + num_tokens)[None]
    first = relocate_keys((kv.keys[0] + size)[None], positions, TURNING)[0]
    keys = tuple(key.to(dtype) for key in (first, kv.keys[1]))
    values = tuple(value.to(dtype) for value in kv.values)
    return made_chunk(num_tokens, shapes=SHAPES, origin=origin, keys=keys, values=values)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_codec_keeps_to_its_error_and_bytes(codec, dtype):
    kv = rotated(dtype=dtype)
    found = codec_error(kv, codec, ROPE)
    assert found["key_error"] <= BOUNDS[codec][0]
    assert found["value_error"] <= BOUNDS[codec][1]
    if codec != "as-is":
        assert found["key_error"] > 0
    back = round_trip(kv, codec, ROPE)
    assert {tensor.dtype for _, tensor in back.tensors()} == {dtype}
    assert [t.shape for _, t in back.tensors()] == [t.shape for _, t in kv.tensors()]
    if dtype == torch.bfloat16:
        assert (
            found["bytes_per_token"] <= BYTES[codec] * codec_error(kv, "as-is")["bytes_per_token"]
        )


def test_integers_are_better_before_the_rotation_than_after():
    kv = rotated(500)
    unturned = RopeSpec((LayerRope(torch.zeros(32)), STILL))
    before, after = (codec_error(kv, "int4", rope)["key_error"] for rope in (ROPE, unturned))
    assert before < 0.8 * after


@pytest.mark.parametrize("num_tokens", [1, 2, 31, 32, 33, 65])
@pytest.mark.parametrize("codec", LOSSY)
def test_every_length_and_constant_channels(num_tokens, codec):
    kv = rotated(num_tokens)
    assert codec_error(kv, codec, ROPE)["value_error"] <= BOUNDS[codec][1]
    still = made_chunk(
        num_tokens,
        shapes=((1, 3),),
        keys=(torch.zeros(1, num_tokens, 3),),
        values=(torch.full((1, num_tokens, 3), 7.0),),
    )
    back = round_trip(still, codec, RopeSpec((STILL,)))
    torch.testing.assert_close(back.values[0], still.values[0], rtol=1e-2, atol=0)
    assert torch.equal(back.keys[0], still.keys[0])


@pytest.mark.parametrize("codec", LOSSY)
def test_large_numbers_do_not_overflow(codec):
    kv = rotated(40)
    kv = made_chunk(40, keys=[key * 1e6 for key in kv.keys], values=kv.values, shapes=SHAPES)
    back = round_trip(kv, codec, ROPE)
    assert all(torch.isfinite(key).all() for key in back.keys)


@pytest.mark.parametrize("codec", LOSSY)
def test_small_numbers_do_not_vanish(codec):
    kv = rotated(40, torch.float32)
    small = [value * 1e-5 for value in kv.values]
    kv = made_chunk(40, keys=kv.keys, values=small, shapes=SHAPES)
    assert codec_error(kv, codec, ROPE)["value_error"] <= BOUNDS[codec][1]


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("secret", [None, b"k" * 32])
def test_a_file_gives_back_what_was_handed_out(tmp_path, codec, secret):
    config = StoreConfig(folder=tmp_path, memory=0, codec=codec)
    store = ChunkStore(config=config, secret=secret)
    store.write_manifest(MODEL, lambda: {"fingerprint": MODEL}, ROPE)
    kv = rotated()
    key = chunk_key(MODEL, kv.token_ids)
    kept = store.put(key, kv)
    # Whoever reads it needs no setting: the file says how it is stored.
    assert_same_chunk(ChunkStore(0, tmp_path, secret=secret).get(key, kv.token_ids, MODEL), kept)
    states = ChunkStates(kv.keys[0][0], 3, kv.token_ids, MODEL)
    store.put(states_key(key, 3), states)
    found = store.get(states_key(key, 3), kv.token_ids, MODEL, ChunkStates)
    assert torch.equal(found.states, states.states)


def test_integers_without_frequencies_say_what_is_missing(tmp_path):
    store = ChunkStore(config=StoreConfig(folder=tmp_path, codec="int4"))
    with pytest.raises(ValueError, match="through an engine, or use fp8"):
        store.put(chunk_key(MODEL, range(5)), made_chunk(5))
    with pytest.raises(ValueError, match=r"codec must be one of as-is, .* got 'mp3'"):
        StoreConfig(codec="mp3")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_an_answer_does_not_depend_on_where_a_chunk_was_found(tokenizer, tmp_path, codec, family):
    usages, texts = [], []
    for memory in (1 << 24, 0, 1 << 24):
        config = StoreConfig(folder=tmp_path, memory=memory, codec=codec)
        engine = engine_of(FAMILIES[family](), tokenizer, store=ChunkStore(config=config))
        for _ in range(2):
            [answer] = engine.answer([ASK], "cacheblend", max_new_tokens=4)
            usages.append((answer.usage.chunk_hits, answer.usage.chunk_misses))
            texts.append(answer.token_ids)
    assert usages[0][0] == 0
    assert all(misses == 0 for _, misses in usages[1:])
    assert len({tuple(text) for text in texts}) == 1


def test_a_file_that_fails_when_its_layers_are_read_is_looked_at_again(
    tokenizer, tmp_path, monkeypatch
):
    def engine():
        store = ChunkStore(config=StoreConfig(folder=tmp_path, memory=0))
        return engine_of(FAMILIES["llama"](), tokenizer, store=store)

    [expected] = engine().answer([ASK], "naive", max_new_tokens=4)
    calls = []

    def fails(self, name, out):
        calls.append(name)
        raise ValueError("it is cut off")

    monkeypatch.setattr(chunk_file.ChunkFile, "read_into", fails)
    [answer] = engine().answer([ASK], "naive", max_new_tokens=4)
    assert (answer.token_ids, len(calls)) == (expected.token_ids, 1)
    assert (answer.usage.chunk_hits, answer.usage.chunk_misses) == (3, 0)
    for path in tmp_path.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-100])
    [answer] = engine().answer([ASK], "naive", max_new_tokens=4)
    assert (answer.token_ids, answer.usage.chunk_misses) == (expected.token_ids, 3)


@pytest.mark.parametrize("codec", CODECS)
def test_a_rank_reads_and_verifies_only_its_heads(codec, tmp_path, monkeypatch):
    kv = rotated(100, dtype=torch.float32)
    ids, key = kv.token_ids.tolist(), chunk_key(MODEL, kv.token_ids.tolist())
    store = ChunkStore(config=StoreConfig(folder=tmp_path, memory=0, codec=codec))
    store.write_manifest(MODEL, lambda: {"fingerprint": MODEL}, ROPE)
    store.put(key, kv)
    size = count_reads(monkeypatch)

    def part(*share):
        size.clear()
        return store.lookup(
            key, ids, MODEL, read=partial(ChunkFile.entry, share=share), keep=False
        ).kv

    whole = part(0, 1)
    most, halves = sum(size), [part(rank, 2) for rank in (0, 1)]
    # The second layer has one head, which both ranks need.
    assert sum(size) < 0.7 * most
    for rank, half in enumerate(halves):
        assert torch.equal(half.keys[0], whole.keys[0][rank : rank + 1])
        assert torch.equal(half.values[0], whole.values[0][rank : rank + 1])
        assert torch.equal(half.keys[1], whole.keys[1])
    [path] = tmp_path.rglob("*.safetensors")
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    told = json.loads(data[8:start])["value.0" if codec == "as-is" else "value.0.codes"]
    data[start + told["data_offsets"][1] - 1] ^= 1  # in the last head
    path.write_bytes(data)
    assert part(0, 2) is not None
    assert part(1, 2) is part(0, 1) is None


def test_signed_and_older_files_are_verified_whole(tmp_path, monkeypatch):
    kv, secret = rotated(100), b"k" * 16
    key, ids = chunk_key(MODEL, kv.token_ids.tolist()), kv.token_ids.tolist()
    size = count_reads(monkeypatch)
    for folder, used, sums in (("signed", secret, True), ("old", None, False)):
        if not sums:
            monkeypatch.setattr(chunk_file, "_BY_HEAD", ())
        store = ChunkStore(config=StoreConfig(folder=tmp_path / folder, memory=0), secret=used)
        store.put(key, kv)
        monkeypatch.setattr(chunk_file, "_BY_HEAD", ("key.", "value."))
        size.clear()
        half = store.lookup(key, ids, MODEL, read=partial(ChunkFile.entry, share=(1, 2))).kv
        assert sum(size) > kv.num_bytes
        assert torch.equal(half.keys[0], kv.keys[0][1:])


def count_reads(monkeypatch) -> list[int]:
    """Bytes of each read from a file, from now on."""
    read, sizes = OpenFile.read_into, []

    def counted(self, buffers, start):
        sizes.append(sum(map(len, buffers)))
        return read(self, buffers, start)

    monkeypatch.setattr(OpenFile, "read_into", counted)
    return sizes
