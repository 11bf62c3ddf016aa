"""Traces: the same chunks return as the pattern says, and serving them is summed up by hand."""

import json
from pathlib import Path

import pytest
from evaluation.test_runner import make_engine
from serve_traces import run_traces, traces_table
from traces import Pattern, load_traces, make_trace, parse_traces, reuse_of, summed_up

from blocktune.data import RagExample, load_examples
from blocktune.prompt import Chunk

SOURCE = "worlds:test?seed=1&n=4&passages=3&kinds=self-contained"
RECORD = {
    "model": "random",
    "task": {"name": "worlds", "source": SOURCE, "max_new_tokens": 2},
    "methods": ["full-prefill", "naive"],
    "patterns": [{"name": "kept"}, {"name": "mixed", "order": "shuffled", "fresh": 0.5}],
    "questions": 3,
    "requests": 6,
    "warmup": 3,
}


@pytest.fixture(scope="module")
def examples():
    return load_examples(SOURCE)


def test_every_question_returns_equally_often(examples):
    trace = make_trace(examples, Pattern("kept"), 12, seed=0)
    asked = [request.question for request in trace]
    assert {asked.count(example.question) for example in examples} == {3}
    assert all(request in examples for request in trace)
    assert trace == make_trace(examples, Pattern("kept"), 12, seed=0)
    assert trace != make_trace(examples, Pattern("kept"), 12, seed=1)


def test_a_mixed_trace_keeps_the_evidence_and_exchanges_the_rest(examples):
    trace = make_trace(examples, Pattern("m", order="shuffled", fresh=1.0), 20, seed=0)
    known = {example.question: example for example in examples}
    exchanged = 0
    for request in trace:
        example = known[request.question]
        evidence = {example.chunks[i] for i in example.supporting}
        assert {request.chunks[i] for i in request.supporting} == evidence
        assert len(set(request.chunks)) == len(request.chunks) == len(example.chunks)
        exchanged += len(set(request.chunks) - set(example.chunks))
    assert exchanged > 0


def test_rotated_chunks_follow_the_one_they_followed_and_keep_the_evidence_in_order():
    chunks = tuple(map(Chunk, "abcde"))
    example = RagExample("q", chunks, ("x",), supporting=(1, 3))
    trace = make_trace([example], Pattern("r", order="rotated"), 40, seed=0)
    texts = {"".join(chunk.text for chunk in request.chunks) for request in trace}
    assert texts == {"abcde", "bcdea", "eabcd"}
    for request in trace:
        evidence = [request.chunks[index].text for index in request.supporting]
        assert evidence == ["b", "d"]


def test_reuse_is_counted_by_hand():
    one, two, three = (Chunk(text) for text in "abc")
    trace = [
        RagExample("q", (one, two), ("x",)),
        RagExample("q", (one, three), ("x",)),
        RagExample("q", (two, one), ("x",)),
    ]
    # Of six chunks three were met before; one of them (a, opening again) stands where it stood.
    assert reuse_of(trace) == {"chunks": 6, "returning": 3 / 6, "same_context": 1 / 6}


def test_too_few_chunks_to_mix_are_refused():
    chunks = (Chunk("a"), Chunk("b"))
    lonely = [RagExample("q", chunks, ("x",), supporting=(0,))]
    with pytest.raises(ValueError, match="the task has only 2; raise 'questions'"):
        make_trace(lonely, Pattern("m", fresh=1.0), 1, seed=0)


def test_traces_are_served_from_empty_caches_and_summed_up(tmp_path):
    engine = make_engine()
    results = run_traces(parse_traces(RECORD), tmp_path, load=lambda *_: engine)
    written = json.loads((tmp_path / "traces.json").read_text())
    assert written["traces"] == results["traces"]
    assert list(results["traces"]) == ["kept", "mixed"]
    cells = {cell["method"]: cell for cell in results["traces"]["kept"]["cells"]}
    full, naive = cells["full-prefill"], cells["naive"]
    assert (naive["n"], full["recompute_ratio"], naive["recompute_ratio"]) == (3, 1, 0)
    trace = make_trace(load_examples(SOURCE, limit=3), Pattern("kept"), 6, seed=0)
    before = [{c for r in trace[:i] for c in r.chunks} for i in range(6)]
    hits = [chunk in before[i] for i in (3, 4, 5) for chunk in trace[i].chunks]
    assert naive["hit_rate"] == sum(hits) / len(hits)
    assert naive["stored_bytes"] > full["stored_bytes"] == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "cells",
        "traces.json",
        "traces-kept.png",
        "traces-mixed.png",
    }
    table = traces_table(results)
    assert [row[0] for row in table.rows][:2] == ["kept: full-prefill", "kept: naive"]


def test_a_stopped_run_goes_on_with_the_first_cell_that_is_missing(tmp_path):
    engine, suite = make_engine(), parse_traces(RECORD)
    first = run_traces(suite, tmp_path, load=lambda *_: engine)
    (tmp_path / "cells" / "mixed-naive-0.json").unlink()
    answered, answer = [], engine.answer
    engine.answer = lambda *given, **more: answered.append(given[1]) or answer(*given, **more)
    again = run_traces(suite, tmp_path, load=lambda *_: engine)
    assert len(answered) == suite.requests
    times = {"ttft_s": None}
    for pattern in first["traces"]:
        cells = [run["traces"][pattern]["cells"] for run in (first, again)]
        assert [c | times for c in cells[0]] == [c | times for c in cells[1]]


def cell(method, scores, mib=0):
    spent = {"stored_bytes": 8, "hit_rate": None, "recompute_ratio": 0.5, "ttft_s": 1.0}
    fixed = {"method": method, "adapter": None, "store_mib": mib, "n": 2 * len(scores)}
    return fixed | spent | {"scores": scores}


def test_cells_are_paired_over_questions_and_seeds_are_one_method():
    even = [0.0, 1.0] * 10
    served = [
        cell("naive", [0.0] * 20),
        cell("tuned-0", even),
        cell("tuned-1", [1.0] * 20),
        cell("naive", even, mib=4),
    ]
    naive, tuned, small = summed_up(served, {"tuned": ["tuned-0", "tuned-1"]}, seed=0)
    assert (tuned["method"], tuned["score"], tuned["n"], tuned["questions"]) == (
        "tuned",
        0.75,
        40,
        20,
    )
    assert tuned["seeds"] == {"tuned-0": 0.5, "tuned-1": 1.0}
    assert tuned["minus"]["naive"]["mean"] == 0.75 == -naive["minus"]["tuned"]["mean"]
    assert tuned["minus"]["naive"]["p"] < 0.01
    assert (small["store_mib"], small["minus"]) == (4, {})
    assert naive["hit_rate"] is None


@pytest.mark.parametrize(
    "path", sorted(Path("eval/study/suites").glob("traces*.yaml")), ids=lambda p: p.stem
)
def test_shipped_suites_load(path):
    assert load_traces(path).patterns
    assert path.read_text().startswith("# python eval/study/serve_traces.py --trace ")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"patterns": [{"name": "x", "order": "odd"}]},
            "order must be one of kept, shuffled, ",
        ),
        ({"patterns": [{"name": "x", "fresh": 2}]}, "fresh must be a share"),
        ({"warmup": 6}, "warmup must leave requests that count: below 6, got 6"),
        ({"store_mib": []}, "store_mib must hold sizes"),
        ({"methods": ["naive", "naive"]}, "given 2 times"),
        ({"pattern": []}, "unknown key 'pattern'"),
    ],
)
def test_mistakes_are_one_clear_line(change, message):
    with pytest.raises(ValueError, match=message):
        parse_traces(RECORD | change, "t.yaml")
