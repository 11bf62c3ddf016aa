"""A suite runs whole, goes on where it was stopped, and refuses before it starts."""

import json
from dataclasses import replace

import pytest
from tiny_llama import tiny_llama
from tiny_tokenizer import build_tokenizer

from blocktune.cache import ChunkStore
from blocktune.data import load_examples, write_jsonl
from blocktune.engine import Engine
from blocktune.engine.encode import Encoder
from blocktune.evaluation.runner import run_suite
from blocktune.evaluation.suite import parse_suite
from blocktune.files import locked

METHODS = ["full-prefill", "no-context", "naive", {"name": "epic", "params": {"k": 2}}]
SOURCE = "worlds:test?seed=1&n=7&passages=2&kinds=self-contained,cross-chunk"


class CountingEngine(Engine):
    """Counts the questions it answers, and can be stopped after some."""

    answered = 0
    stop_after = 10**9

    def answer(self, examples, method="naive", **kwargs):
        if self.answered >= self.stop_after:
            raise KeyboardInterrupt
        self.answered += len(examples)
        return super().answer(examples, method, **kwargs)


def make_engine() -> CountingEngine:
    tokenizer = build_tokenizer()
    return CountingEngine(tiny_llama(tokenizer, 2048), tokenizer)


def make_suite(**changes):
    tasks = [{"name": "worlds", "source": SOURCE, "max_new_tokens": 4}]
    record = {"model": "random", "methods": METHODS, "tasks": tasks, "batch_size": 3}
    return parse_suite(record | {"ttft": {"num": 2}} | changes)


def run(output, engine, **changes):
    return run_suite(make_suite(**changes), output, command=["test"], load=lambda *_: engine)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    output = tmp_path_factory.mktemp("whole")
    return output, run(output, make_engine())


def test_a_run_writes_a_row_per_question_and_method(whole):
    output, results = whole
    assert json.loads((output / "results.json").read_text()) == results
    assert sorted(p.stem for p in (output / "rows").iterdir()) == sorted(results["methods"])
    examples = load_examples(SOURCE)
    for path in (output / "rows").iterdir():
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        assert [(row["id"], row["kind"]) for row in rows] == [(e.id, e.kind) for e in examples]
        assert all(row["usage"]["layer_tokens"] for row in rows)


def test_a_run_measures_cost_and_time(whole):
    methods = whole[1]["methods"]
    assert methods["full-prefill"]["recompute_ratio"] == 1
    assert methods["naive"]["recompute_ratio"] == methods["no-context"]["recompute_ratio"] == 0
    assert 0 < methods["epic"]["recompute_ratio"] < 0.2
    assert methods["full-prefill"]["ttft_over_full_prefill"] == 1
    assert all(m["ttft_s"] > 0 and m["ttft_n"] == 2 and m["n"] == 7 for m in methods.values())
    assert set(methods["naive"]["tasks"]) == {"self-contained", "cross-chunk"}
    assert whole[1]["provenance"].keys() >= {"command", "commit", "versions", "hardware", "seed"}


def test_a_stopped_run_goes_on_and_ends_the_same(whole, tmp_path):
    stopped = make_engine()
    stopped.stop_after = 10  # in the second batch of the second method
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, stopped)
    assert not (tmp_path / "results.json").exists()
    half_line = '{"key": "0123", "ta'
    with (tmp_path / "rows" / "no-context.jsonl").open("a") as out:
        out.write(half_line)
    resumed = make_engine()
    results = run(tmp_path, resumed)
    assert resumed.answered == 4 * 7 - stopped.answered + 2 * 2 * 4  # the rest, and the timing
    for path in (whole[0] / "rows").iterdir():
        assert (tmp_path / "rows" / path.name).read_text() == path.read_text()
    assert _scores(results) == _scores(whole[1])


def test_methods_share_the_chunks_of_a_batch_and_no_row_depends_on_their_order(
    tmp_path, monkeypatch
):
    encoded = []
    encode = Encoder._encode_together
    monkeypatch.setattr(
        Encoder, "_encode_together", lambda *args: encoded.append(args[1]) or encode(*args)
    )
    labels = ["naive", "epic", "cache-craft", "full-prefill", "prefix-cache", "link0", "cacheblend"]
    counts = {}
    for name, methods in {"": labels, "turned": labels[::-1], "two": labels[:2]}.items():
        encoded.clear()
        run(tmp_path / name, make_engine(), methods=methods, ttft={"num": 0})
        counts[name] = sum(map(len, encoded))
    for label in labels:
        rows = [tmp_path / name / f"rows/{label}.jsonl" for name in ("", "turned")]
        assert rows[0].read_text() == rows[1].read_text()
    prefixes = 3  # one of each batch
    assert counts["two"] == prefixes + sum(len(one.chunks) for one in load_examples(SOURCE))


def test_rows_of_a_method_with_a_history_depend_on_the_batches(tmp_path):
    options = {"methods": ["naive", "cache-craft"], "ttft": {"num": 0}}
    run(tmp_path, make_engine(), **options)
    again = make_engine()
    run(tmp_path, again, **options, batch_size=1)
    assert again.answered == len(load_examples(SOURCE))  # by cache-craft alone


@pytest.mark.parametrize("method", ["cache-craft", "recycle"])
def test_prompts_of_earlier_runs_are_not_found_in_a_store_with_files(tmp_path, method):
    engine = make_engine()
    engine.store = ChunkStore(folder=tmp_path / "store")
    with pytest.raises(ValueError, match=f"'{method}' would find the prompts of earlier runs"):
        run(tmp_path / "out", engine, methods=["naive", method])
    assert not (tmp_path / "out").exists()


def test_a_finished_run_computes_nothing_again(whole, tmp_path):
    first = run(tmp_path, make_engine())
    again = make_engine()
    assert run(tmp_path, again) == first
    assert again.answered == 0


@pytest.mark.parametrize("count", [1, 2])
def test_prompts_are_timed_as_if_they_had_not_been_answered_before(tmp_path, monkeypatch, count):
    """An exact prefix cache that holds the very prompt would be timed at nothing.

    Neither another question over the same chunks nor another method may have left it there.
    """
    examples = load_examples(SOURCE)[:2]
    same = [replace(e, chunks=examples[0].chunks[:count], supporting=()) for e in examples]
    write_jsonl(tmp_path / "q.jsonl", same)
    tasks = [{"name": "mine", "source": str(tmp_path / "q.jsonl"), "max_new_tokens": 2}]
    engine, timed = make_engine(), []

    def answer(examples, method, *, max_new_tokens, **kwargs):
        made = Engine.answer(engine, examples, method, max_new_tokens=max_new_tokens, **kwargs)
        timed.extend(one.usage for one in made if max_new_tokens == 1)
        return made

    monkeypatch.setattr(engine, "answer", answer)
    again = {"name": "again", "preset": "prefix-cache"}
    run(tmp_path / "out", engine, methods=["prefix-cache", again], tasks=tasks)
    assert len(timed) == 2 * 2 * 2
    assert all(usage.chunk_misses > 0 for usage in timed)


def test_other_decoding_is_another_run(tmp_path):
    run(tmp_path, make_engine(), methods=["naive"], ttft={"num": 0})
    engine = make_engine()
    tasks = [{"name": "worlds", "source": SOURCE, "max_new_tokens": 5}]
    run(tmp_path, engine, methods=["naive"], tasks=tasks, ttft={"num": 0})
    assert engine.answered == 7
    assert len((tmp_path / "rows" / "naive.jsonl").read_text().splitlines()) == 7


@pytest.mark.parametrize(
    ("methods", "message"),
    [
        (["naive", "telepathy"], "unknown reuse method 'telepathy'; available: "),
        ([{"name": "epic", "params": {"kk": 3}}], "'epic' takes k, share, .*got unknown kk"),
        (["kvlink"], "'kvlink' needs an adapter trained with link tokens, got none"),
    ],
)
def test_a_method_that_cannot_run_is_refused_before_anything_is_written(tmp_path, methods, message):
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", make_engine(), methods=methods)
    assert not (tmp_path / "out").exists()


def test_timing_with_more_chunks_than_there_are_is_refused(tmp_path):
    with pytest.raises(ValueError, match="prompts of 99 chunks, the task holds only 14"):
        run(tmp_path / "out", make_engine(), ttft={"num": 1, "chunks": 99})
    assert not (tmp_path / "out").exists()


def test_questions_without_answers_are_refused(tmp_path):
    [example, *_] = load_examples(SOURCE)
    write_jsonl(tmp_path / "q.jsonl", [example, replace(example, answers=())])
    tasks = [{"name": "mine", "source": str(tmp_path / "q.jsonl")}]
    with pytest.raises(ValueError, match=r"question 2 cannot be scored: "):
        run(tmp_path / "out", make_engine(), tasks=tasks)


def test_a_smaller_run_into_a_finished_folder_is_refused_and_a_larger_one_adds(tmp_path):
    task = {"name": "worlds", "source": SOURCE, "max_new_tokens": 4}
    few = {"methods": ["naive"], "tasks": [task | {"limit": 4}], "ttft": {"num": 0}}
    all_ = few | {"tasks": [task]}
    run(tmp_path, make_engine(), **few)
    engine = make_engine()
    run(tmp_path, engine, **all_)
    assert engine.answered == 4  # the first batch was whole
    before = (tmp_path / "rows" / "naive.jsonl").read_text()
    message = r"naive\.jsonl' has answers to 3 questions that this run does not ask.*another output"
    with pytest.raises(ValueError, match=message):
        run(tmp_path, make_engine(), **few)
    assert (tmp_path / "rows" / "naive.jsonl").read_text() == before
    half = tmp_path / "half"  # a stopped run's parts are not lost either
    (half / "rows").mkdir(parents=True)
    (half / "rows" / "naive.part0.jsonl").write_text(before)
    with pytest.raises(ValueError, match="does not ask"):
        run(half, make_engine(), **few)


def test_of_questions_that_share_an_id_none_is_lost(tmp_path):
    first, second, *_ = (replace(e, id="q1") for e in load_examples(SOURCE))
    write_jsonl(tmp_path / "q.jsonl", [first, second])
    task = {"name": "mine", "source": str(tmp_path / "q.jsonl"), "max_new_tokens": 2}
    out, few = tmp_path / "out", {"methods": ["naive"], "ttft": {"num": 0}}
    run(out, make_engine(), **few, tasks=[task])
    before = (out / "rows" / "naive.jsonl").read_text()
    with pytest.raises(ValueError, match="answers to 1 questions that this run does not ask"):
        run(out, make_engine(), **few, tasks=[task | {"limit": 1}])
    assert (out / "rows" / "naive.jsonl").read_text() == before
    run(out, make_engine(), **few, tasks=[task])


@pytest.mark.parametrize("text", ["[]", "null", "{}"])
def test_a_record_of_times_that_is_none_is_measured_again(tmp_path, text):
    for name in ("ttft", "fidelity"):
        (tmp_path / f"{name}.json").write_text(text)
    run(tmp_path, make_engine(), methods=["naive"], fidelity={"num": 1})
    assert "keys" in json.loads((tmp_path / "ttft.json").read_text())


def test_a_metric_that_cannot_read_the_answers_is_refused_before_the_first_question(tmp_path):
    [example, *_] = load_examples(SOURCE)
    write_jsonl(tmp_path / "q.jsonl", [example, replace(example, answers=("Москва",))])
    tasks = [{"name": "mine", "source": str(tmp_path / "q.jsonl"), "metrics": ["rouge_l"]}]
    engine = make_engine()
    with pytest.raises(ValueError, match=r"question 2 .* rouge_l reads a-z and 0-9 only"):
        run(tmp_path / "out", engine, tasks=tasks)
    assert engine.answered == 0


def _scores(results):
    timed = ("ttft_s", "ttft_s_quartiles", "ttft_over_full_prefill")
    return [
        {key: value for key, value in summary.items() if key not in timed}
        for summary in results["methods"].values()
    ]


def test_a_second_run_into_the_same_folder_is_refused(tmp_path):
    with locked(tmp_path / ".lock"), pytest.raises(ValueError, match="another process is"):
        run(tmp_path, make_engine())


def test_questions_without_ids_are_known_by_what_they_ask(tmp_path):
    """By their number, another file's answers would be deleted, and compared with these."""
    examples = [replace(e, id="") for e in load_examples(SOURCE)]
    for name, own in (("a", examples[:3]), ("b", examples[3:6]), ("c", examples[2::-1])):
        write_jsonl(tmp_path / f"{name}.jsonl", own)
    out = tmp_path / "out"

    def asked(name):
        tasks = [{"name": "mine", "source": str(tmp_path / f"{name}.jsonl"), "max_new_tokens": 2}]
        run(out, make_engine(), tasks=tasks, methods=["naive"], ttft={"num": 0})
        return [json.loads(line)["id"] for line in (out / "rows" / "naive.jsonl").open()]

    first = asked("a")
    before = (out / "rows" / "naive.jsonl").read_text()
    with pytest.raises(ValueError, match="does not ask"):
        asked("b")
    assert (out / "rows" / "naive.jsonl").read_text() == before
    assert asked("c") == first[::-1]
