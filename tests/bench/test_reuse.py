"""The bench of reuse, run small: keys, costs, and that it times what it says."""

import json
import time

import pytest
import torch
from commands.conftest import blocktune  # noqa: F401

from blocktune.bench.reuse import (
    RATIOS,
    TINY,
    ReuseBench,
    bench_reuse,
    query_only,
    ratios,
    spread,
    take_turns,
)
from blocktune.methods import build

METHODS = {"full", "naive", "epic", "cacheblend"}


pytestmark = pytest.mark.usefixtures("small_benches")


@pytest.fixture(scope="module")
def found(small_benches):
    return bench_reuse(TINY)


def test_the_ratios_are_medians(found):
    assert all(found[name] > 0 for name in RATIOS)
    assert found["seconds"].keys() == METHODS | {"full_engine", "full_stock", "query_only"}
    assert found["setting"]["tokens"] == TINY.tokens
    assert {name: found["spread"][name]["median"] for name in RATIOS} == {
        name: found[name] for name in RATIOS
    }


def test_costs_are_those_of_the_methods(found):
    cost = found["cost"]
    assert cost.keys() == METHODS
    context = TINY.tokens - TINY.question
    states = 2 * TINY.layers * TINY.kv_heads * (TINY.width // TINY.heads)
    assert cost["naive"]["bytes_read"] == context * (4 * states + 8)  # and an int64 token id
    assert cost["naive"]["recompute_ratio"] == 0
    assert cost["full"]["recompute_ratio"] == 1
    assert cost["full"]["bytes_read"] == 0
    flops = [cost[name]["flops"] for name in ("naive", "epic", "cacheblend", "full")]
    assert flops == sorted(flops)
    copied = cost["naive"]["bytes_over_copy_rate_s"] * found["bytes_per_s_copied"]
    assert 2 * copied == pytest.approx(cost["naive"]["bytes_moved"])
    assert copied >= cost["naive"]["bytes_read"]


@torch.no_grad()
def test_the_question_alone_gives_the_logits_of_naive_reuse():
    engine = TINY.engine()
    run = engine.start([TINY.pieces(len(engine.tokenizer))], build("naive"))
    seen = []
    hook = engine.model.register_forward_hook(lambda m, a, out: seen.append(out.logits[:, -1]))
    query_only(engine.model, run)()
    hook.remove()
    torch.testing.assert_close(seen[0], run.prefill.logits, rtol=0, atol=1e-5)


def test_the_default_setting():
    bench = ReuseBench()
    pieces = bench.pieces(258)
    assert sum(map(len, (*pieces.chunks, pieces.query))) == 8192
    assert {len(chunk) for chunk in pieces.chunks[:-1]} == {512}
    assert (bench.layers, bench.width, bench.heads, bench.kv_heads) == (12, 768, 12, 4)
    assert (bench.threads, bench.k, bench.ratio) == (2, 16, 0.15)


def test_a_prompt_without_room_is_refused():
    with pytest.raises(
        ValueError, match="needs two chunks of 512 and a question of 64, got 512 tokens; give"
    ):
        ReuseBench(tokens=512, chunk=512)


@pytest.fixture
def work_for(monkeypatch):
    """Work of a given length, on a clock that only such work moves."""
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])

    def work(seconds):
        clock[0] += seconds

    return work


def test_rounds_are_compared_within_and_the_first_is_not_counted(work_for):
    seconds = iter([2.5, 2.5, 1.0, 2.0, 3.0, 4.0, 1.0, 4.0])
    works = dict.fromkeys("ab", lambda: work_for(next(seconds)))
    times = take_turns(works, 3)
    assert times == {"a": [1.0, 3.0, 1.0], "b": [2.0, 4.0, 4.0]}
    assert ratios(times, "a", "b") == [0.5, 0.75, 0.25]
    assert spread(times["a"]) == {"median": 1.0, "least": 1.0, "greatest": 3.0}


def test_work_that_an_accelerator_still_does_is_counted(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: time.sleep(0.05))
    assert take_turns({"a": lambda: None}, 1)["a"][0] >= 0.05


def test_a_long_work_is_not_warmed_up(work_for):
    calls = []

    def work(name, seconds):
        calls.append(name)
        work_for(seconds)

    times = take_turns({"long": lambda: work("long", 9.0), "short": lambda: work("short", 1.0)}, 2)
    assert times == {"long": [9.0, 9.0], "short": [1.0, 1.0]}
    assert calls == ["long", "short", "long", "short", "short"]


def test_the_command_prints_them_and_writes_them(blocktune, found, tmp_path):  # noqa: F811
    written = tmp_path / "new" / "reuse.json"
    shown = blocktune("bench", "reuse", "--tiny", "--repeats", 1, "--output", written).stdout
    assert "naive_over_query_only: " in shown
    assert json.loads(written.read_text()).keys() == found.keys()
    assert {"command", "commit", "hardware", "versions"} <= found.keys()
