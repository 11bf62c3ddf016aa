"""Chunks that a reader missed are queued once, encoded by any engine of their model, and gone."""

from pathlib import Path

import pytest
from typer.testing import CliRunner

from blocktune.cache import ChunkStore, key_after
from blocktune.cache.store.shelf import MissQueue, Wanted
from blocktune.commands import app
from blocktune.engine import Engine
from blocktune.testing import small_engine

OTHER = "b" * 64


@pytest.fixture(scope="module")
def made():
    return small_engine()


def test_wanted_chunks_are_encoded_and_leave_the_queue(made, tmp_path):
    store = ChunkStore(0, folder=tmp_path)
    engine = Engine(made.model, made.tokenizer, format=made.format, store=store)
    queue = MissQueue(tmp_path)
    assert queue.take(engine.fingerprint) == []
    for _ in range(2):
        queue.add(engine.fingerprint, [Wanted((5, 6, 7)), Wanted((8, 9), (4,))])
    queue.add(engine.fingerprint, [Wanted((5,) * 5000)])  # longer than the model's context
    queue.add(OTHER, [Wanted((5, 6, 7))])
    assert {Wanted((5, 6, 7), ()), Wanted((8, 9), (4,))} < set(queue.take(engine.fingerprint))
    assert len(queue.take(engine.fingerprint, most=1)) == 1
    assert engine.encode_wanted() == 3
    kv = store.get(key_after(engine.fingerprint, (8, 9), (4,)), (8, 9), engine.fingerprint)
    assert kv.num_tokens == 2
    assert engine.encode_wanted() == 0
    assert queue.take(OTHER) == [Wanted((5, 6, 7), ())]


def test_what_is_no_order_is_left_alone(made, tmp_path):
    queue = MissQueue(tmp_path)
    (folder := queue.folder / OTHER).mkdir(parents=True)
    for name, text in (("a.json", "{"), ("b.json", "[]"), ("c.json", '{"fingerprint": 1}')):
        (folder / name).write_text(text)
    queue.add(OTHER, [Wanted((5, 6))])
    [order] = folder.glob("?" * 64 + ".json")
    (folder / "copy.json").write_text(order.read_text())  # it would be encoded for ever
    (folder / "d.json").write_text(order.read_text().replace("5", '"five"'))
    assert queue.take(OTHER) == [Wanted((5, 6))]
    queue.done(OTHER, queue.take(OTHER))
    assert queue.take(OTHER) == []
    assert len(list(folder.iterdir())) == 5
    with pytest.raises(ValueError, match="use a store with a folder"):
        made.encode_wanted()


def test_the_encoder_owns_the_folder_that_others_write_into(tmp_path):
    """Only the owner of a folder may remove what another user has put there."""
    queue = MissQueue(tmp_path)
    queue.take(OTHER)
    assert (queue.folder / OTHER).is_dir()


def test_what_other_models_want_is_not_read(tmp_path, monkeypatch):
    queue = MissQueue(tmp_path)
    queue.add(OTHER, [Wanted((5, n)) for n in range(20)])
    read = Path.read_text

    def refuse(path, *arguments):
        assert OTHER not in str(path)
        return read(path, *arguments)

    monkeypatch.setattr(Path, "read_text", refuse)
    queue.add("f" * 64, [Wanted((5, 6))])
    assert queue.take("f" * 64) == [Wanted((5, 6))]


def test_readers_of_a_folder_that_cannot_be_written_are_warned(tmp_path, caplog):
    queue = MissQueue(tmp_path)
    queue.folder.write_text("a file in its place")
    queue.add(OTHER, [Wanted((5, 6))])
    [record] = caplog.records
    assert record.getMessage().startswith(f"cannot queue chunks in '{queue.folder}': ")


def test_the_follower_encodes_what_is_wanted_until_it_is_stopped(tmp_path, monkeypatch):
    engine = Engine.from_pretrained("data/tiny", store=tmp_path, dtype="float32", device="cpu")
    queue = MissQueue(tmp_path)
    queue.add(engine.fingerprint, [Wanted((5, 6, 7)), Wanted((8, 9), (4,))])

    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr("blocktune.commands.answer.time.sleep", stop)
    words = ["encode", "--follow", "--store", str(tmp_path), "-m", "data/tiny"]
    done = CliRunner().invoke(app, [*words, "--dtype", "float32", "--device", "cpu"])
    assert done.exit_code == 130
    assert "encoded 2 chunks that readers missed" in done.stdout
    assert key_after(engine.fingerprint, (8, 9), (4,)) in ChunkStore(folder=tmp_path)
    assert queue.take(engine.fingerprint) == []
    assert CliRunner().invoke(app, words[:1] + words[2:]).exit_code == 2


def test_tokens_that_no_model_has_do_not_stop_the_encoder(made, tmp_path):
    """A client of vLLM may send any ids."""
    engine = Engine(made.model, made.tokenizer, format=made.format, store=ChunkStore.open(tmp_path))
    queue = MissQueue(tmp_path)
    queue.add(engine.fingerprint, [Wanted((1_000_000,)), Wanted((5,), (1_000_000,)), Wanted((5,))])
    assert engine.encode_wanted() == 3
    assert queue.take(engine.fingerprint) == []
    assert engine.store.stats().files.bytes_written > 0


def test_a_queue_without_a_folder_is_empty():
    queue = MissQueue(None)
    queue.add(OTHER, [Wanted((1, 2))])
    queue.done(OTHER, [Wanted((1, 2))])
    assert queue.take(OTHER) == []
