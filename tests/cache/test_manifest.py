"""The manifest of a store: what the engine writes, read as plain JSON."""

import json

import pytest
import torch
from engine.served import ASK, engine_of
from families import FAMILIES

from blocktune.cache import ChunkStore
from blocktune.cache.store.folder import ChunkFolder
from blocktune.models.identity import tokenizer_hash


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_the_engine_describes_its_chunks(tokenizer, tmp_path, family):
    engine = engine_of(FAMILIES[family](), tokenizer, store=ChunkStore(folder=tmp_path))
    [path] = (tmp_path / "manifests").iterdir()
    record = json.loads(path.read_text())
    assert path.name == f"{engine.fingerprint}.json"
    assert record["fingerprint"] == engine.fingerprint
    assert record["tokenizer"]["hash"] == tokenizer_hash(tokenizer)
    assert record["prompt_format"] == engine.format.to_dict()
    assert record["adapter"] is None
    piece = engine.prompts.encodable(ASK.chunks)[1][0]
    engine.encode(ASK.chunks)
    encoder = engine.state.encoder
    kv = engine.store.get(encoder.key(piece), piece.ids, engine.fingerprint)
    assert record["dtype"] == str(kv.dtype).removeprefix("torch.")
    shapes = [(k["key"], k["value"]) for k in record["layers"]]
    pairs = zip(kv.keys, kv.values, strict=True)
    assert shapes == [([k.shape[0], k.shape[2]], [v.shape[0], v.shape[2]]) for k, v in pairs]
    rope = record["rope"]
    assert len(rope["layer"]) == len(engine.state.rope.layers)
    for index, expected in zip(rope["layer"], engine.state.rope.layers, strict=True):
        assert torch.equal(torch.tensor(rope["frequencies"][index]), expected.inv_freq.float())
        form = tuple(rope[name][index] for name in ("start", "interleaved", "in_values"))
        assert form == expected[1:]
    assert len(rope["frequencies"]) == {"llama": 1, "gemma3": 2}[family]


def test_a_manifest_is_written_once_and_again_if_damaged(tokenizer, tmp_path, monkeypatch):
    engine_of(FAMILIES["llama"](), tokenizer, store=ChunkStore(folder=tmp_path))
    [path] = (tmp_path / "manifests").iterdir()
    sound, written = path.read_text(), path.stat().st_ino
    engine_of(FAMILIES["llama"](), tokenizer, store=ChunkStore(folder=tmp_path))
    assert path.stat().st_ino == written
    path.write_text("half")
    engine_of(FAMILIES["llama"](), tokenizer, store=ChunkStore(folder=tmp_path))
    assert path.read_text() == sound


def test_with_a_key_a_forged_manifest_is_refused(tmp_path):
    record = {"fingerprint": "ab" * 32, "dtype": "bfloat16"}
    signed, unsigned = ChunkFolder(tmp_path / "a", b"k" * 32), ChunkFolder(tmp_path / "b")
    for folder in (signed, unsigned):
        folder.prepare()
        folder.write_manifest(record)
        assert folder.manifest("ab" * 32) == record
        assert folder.fingerprints() == ["ab" * 32]
    assert ChunkFolder(tmp_path / "a").manifest("ab" * 32) == record
    with pytest.raises(ValueError, match="not signed with the key"):
        ChunkFolder(tmp_path / "b", b"k" * 32).manifest("ab" * 32)
    assert unsigned.manifest("cd" * 32) is None
