"""The bench of loading, run small: what it times, and that the two do the same work."""

import json

import pytest
import torch
from commands.conftest import blocktune  # noqa: F401

from blocktune.bench import TINY, bench_loading
from blocktune.bench.reuse import LOADED
from blocktune.cache import ChunkStore
from blocktune.methods import compose


def test_times_stand_beside_what_overlap_could_leave(tmp_path):
    found = bench_loading(TINY, tmp_path)
    seconds = found["seconds"]
    assert seconds.keys() == {"serial", "overlapped", "serial_load", "bound"}
    assert 0 < seconds["serial_load"]["median"] < seconds["serial"]["median"]
    assert 0.5 <= found["bound_over_serial"] < 1
    assert found["overlapped_over_serial"] > 0
    states = 2 * TINY.layers * TINY.kv_heads * (TINY.width // TINY.heads)
    assert found["bytes_read"] >= (TINY.tokens - TINY.question) * 4 * states
    assert list(tmp_path.iterdir()) == []


@torch.no_grad()
def test_both_compute_the_same_rows_from_the_folder(tmp_path):
    engine = TINY.engine(ChunkStore(max_bytes=0, folder=tmp_path))
    pieces = TINY.pieces(len(engine.tokenizer))
    engine.start([pieces], "naive")
    runs = [engine.start([pieces], compose(m, layer_budget=0.6)) for m in LOADED.values()]
    tokens = [run.prefill.layer_tokens(TINY.layers) for run in runs]
    assert torch.equal(*tokens)
    assert tokens[0].sum() > 0
    torch.testing.assert_close(*(run.prefill.logits for run in runs), rtol=0, atol=1e-5)
    assert all(run.assembled.misses == [0] for run in runs)


def test_the_command_writes_what_it_shows(blocktune, tmp_path):  # noqa: F811
    output = tmp_path / "loading.json"
    result = blocktune(
        "bench", "loading", "--tiny", "--repeats", "1", "--output", str(output), "--json"
    )
    assert result.exit_code == 0, result.output
    assert json.loads(output.read_text()).keys() == json.loads(result.stdout).keys()


@pytest.mark.parametrize("tokens", [16, 100])
def test_a_prompt_too_short_is_refused(blocktune, tokens):  # noqa: F811
    result = blocktune("bench", "loading", "--tokens", str(tokens))
    assert result.exit_code == 2
    assert "needs two chunks" in result.output
