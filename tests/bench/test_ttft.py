"""Time to first token by length: what is timed, its parts, and the command."""

import json

import pytest
from commands.conftest import blocktune  # noqa: F401

from blocktune.bench.ttft import PARTS, bench_ttft, draw_ttft, table
from blocktune.cache import ChunkStore
from blocktune.engine import Engine
from blocktune.methods import Weights
from blocktune.testing import small_engine

pytestmark = pytest.mark.usefixtures("small_benches")


@pytest.fixture(scope="module")
def found(small_benches):
    options = {"chunk": 16, "question": 8, "repeats": 1, "num_threads": 1}
    return bench_ttft(small_engine(Weights.ANY), (48, 96), **options)


def test_each_length_has_its_parts_and_their_limits(found):
    assert list(found["lengths"]) == ["48", "96"]
    assert found["method"] == "naive"
    for one in found["lengths"].values():
        assert one["cached_over_full"] > 0
        assert one["parts"].keys() == set(PARTS)
        assert [name for name in PARTS if one["parts"][name]["limit"] is None] == ["lookup"]
        assert one["parts"]["join"]["seconds"] < one["seconds"]["cached"]
    held = [one["parts"]["join"]["limit"] for one in found["lengths"].values()]
    assert held[1] / held[0] == pytest.approx(95 / 47, rel=1e-6)


def test_it_is_shown_as_a_table_and_as_a_picture(found, tmp_path):
    text = table(found).markdown()
    assert "| 96 |" in text
    assert text.count("(") == 6
    assert draw_ttft(found, tmp_path / "ttft.png").stat().st_size > 5000


def test_a_prompt_without_room_is_refused_before_any_is_timed(monkeypatch):
    monkeypatch.setattr("blocktune.bench.ttft._timed", None)
    with pytest.raises(ValueError, match="a prompt of 32 tokens has no room for a question of 32"):
        bench_ttft(small_engine(Weights.ANY), (64, 32))
    with pytest.raises(ValueError, match="100000 tokens does not fit, this model's longest is "):
        bench_ttft(small_engine(Weights.ANY), (64, 100_000))


def test_a_store_without_room_is_refused():
    engine = small_engine(Weights.ANY)
    small = Engine(engine.model, engine.tokenizer, format=engine.format, store=ChunkStore(60_000))
    with pytest.raises(ValueError, match="no room for the chunks of 95 tokens"):
        bench_ttft(small, (96,), chunk=16, question=8, repeats=1)


def test_the_command_measures_a_model(blocktune, tmp_path):  # noqa: F811
    kept = tmp_path / "ttft.json"
    options = ["--tokens", "64,128", "--chunk", "16", "--repeats", "1", "--threads", "1"]
    done = blocktune("bench", "ttft", "--model", "data/tiny", *options, "--output", kept)
    assert "of full" in done.stdout
    assert list(json.loads(kept.read_text())["lengths"]) == ["64", "128"]
    kept.unlink()
    options += ["--output", kept, "--picture", tmp_path / "ttft.txt"]
    assert "not supported" in blocktune("bench", "ttft", "-m", "data/tiny", *options).stderr
    assert list(json.loads(kept.read_text())["lengths"]) == ["64", "128"]  # measured, and kept
    wrong = blocktune("bench", "ttft", "--model", "data/tiny", "--tokens", "many")
    assert wrong.exit_code == 2
    assert "--tokens must be lengths such as 512,8192, got 'many'" in wrong.stderr
