"""What each command does when all is well."""

import json

import pytest
import yaml

from blocktune.data import load_examples
from blocktune.methods import available

ASK = ("--question", "Where was Anna born?", "--max-new-tokens", 3)
CHUNKS = ("--chunk", "Anna Belt was born in Port Alder.", "--chunk", "Port Alder is in Lorne.")


@pytest.fixture
def questions(blocktune, tmp_path):
    path = tmp_path / "questions.jsonl"
    done = blocktune(
        "data",
        "worlds",
        "-o",
        path,
        "--n",
        3,
        "--split",
        "test",
        "--passages",
        "2",
        "--kinds",
        "self-contained",
    )
    assert done.exit_code == 0, done.output
    return path


def test_methods_are_listed_for_programs_and_people(blocktune):
    listed = json.loads(blocktune("methods", "--json").stdout)
    methods = [entry for entry in listed if entry["kind"] == "method"]
    assert [entry["name"] for entry in methods] == available()
    assert all(entry["summary"] and entry["source"].startswith("http") for entry in methods)
    assert {entry["kind"] for entry in listed} == {"method", "selector", "reshape", "layout"}
    lines = blocktune("methods").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    starts = {line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "}
    assert {entry["name"] for entry in listed} <= starts


def test_worlds_are_what_the_source_of_that_name_gives(questions):
    assert load_examples(questions) == load_examples(
        "worlds:test?n=3&passages=2&kinds=self-contained"
    )


def test_one_question_is_answered_with_its_usage(blocktune, model):
    result = blocktune("answer", "--model", model, *ASK, *CHUNKS, "--json")
    record = json.loads(result.stdout)
    usage = record["usage"]
    assert record.keys() == {"id", "question", "answer", "method", "usage"}
    assert record["method"] == "naive"
    assert usage["chunk_misses"] == 2
    assert usage["recompute_ratio"] == 0
    assert usage["ttft_s"] == pytest.approx(sum(usage["ttft"].values()))
    panel = blocktune("answer", "--model", model, *ASK, *CHUNKS, "--method", "full-prefill").stdout
    assert "100.0%" in panel
    assert "Where was Anna born?" in panel


def test_a_stream_says_what_the_answer_says(blocktune, model):
    ask = ("answer", "--model", model, *ASK, *CHUNKS, "--method", "cacheblend")
    whole = json.loads(blocktune(*ask, "--json").stdout)["answer"]
    assert whole
    assert blocktune(*ask, "--stream").stdout == whole + "\n"


def test_a_parameter_changes_the_method(blocktune, model):
    ask = ("answer", "--model", model, *ASK, *CHUNKS, "--method", "epic", "--json")
    usages = [
        json.loads(blocktune(*ask, "--param", f"k={k}").stdout)["usage"]["layer_tokens"]
        for k in (1, 3)
    ]
    assert usages == [[2, 2], [6, 6]]


def test_the_prompt_is_shown_row_by_row(blocktune, model):
    shown = blocktune("answer", "--model", model, *ASK, *CHUNKS, "--show-prompt").stdout
    assert "[chunk 0: " in shown
    assert "[query: " in shown
    assert "Port Alder is in Lorne." in shown


def test_encoded_chunks_are_found_again_by_another_engine(blocktune, model, questions, tmp_path):
    store = ("--store", tmp_path / "store")
    encode = ("encode", "--model", model, "--input", questions, *store)
    assert "encoded 6 chunks" in blocktune(*encode).stdout
    assert "6 were there" in blocktune(*encode).stdout
    output = tmp_path / "answers.jsonl"
    ask = ("answer", "--model", model, "-i", questions, "-o", output, "--max-new-tokens", 2)
    done = blocktune(*ask, *store)
    assert done.stdout == f"wrote 3 answers to {output}\n"
    assert done.stderr.endswith(f" chunks read from {store[1]}, 0 encoded anew\n")
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [r["id"] for r in records] == [e.id for e in load_examples(questions)]
    assert all(r["usage"]["chunk_misses"] == 0 for r in records)
    other = blocktune(*ask, *store, "--dtype", "bfloat16").stderr
    assert "\n0 chunks read" in f"\n{other}"
    assert "encoded anew; those that it held are other passages, or of another model" in other


def test_eval_writes_results_table_and_picture(blocktune, model, questions, tmp_path):
    suite = {
        "model": "replaced",
        "methods": ["full-prefill", "naive"],
        "tasks": [{"name": "mine", "source": str(questions), "max_new_tokens": 2}],
        "ttft": {"num": 1},
    }
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    output = tmp_path / "out"
    arguments = ("--suite", tmp_path / "suite.yaml", "--output", output, "--limit", 2)
    done = blocktune("eval", *arguments, "--model", model)
    assert done.exit_code == 0, done.output
    assert "full-prefill" in done.stdout
    results = json.loads((output / "results.json").read_text())
    assert {summary["n"] for summary in results["methods"].values()} == {2}
    assert sorted(path.name for path in output.iterdir()) == [
        "results.json",
        "results.png",
        "rows",
        "ttft.json",
    ]


def test_bench_gives_the_ratios(blocktune):
    arguments = ("--tokens", 256, "--chunk", 64, "--repeats", 1, "--json")
    found = json.loads(blocktune("bench", "attention", *arguments).stdout)
    assert found["split_over_full"] > 0
    assert found["split_over_dense"] > 0


def test_check_says_whether_reuse_is_sound(blocktune, model):
    done = blocktune("check", "--model", model, "--json")
    checks = json.loads(done.stdout)["checks"]
    assert len(checks) >= 4
    assert all(check.keys() == {"name", "passed", "max_abs_diff", "tolerance"} for check in checks)
    assert done.exit_code == 0 if all(check["passed"] for check in checks) else 1


def test_layer_ranges_are_profiled(blocktune, model, questions):
    result = blocktune("intervals", "--model", model, "--input", questions, "--json")
    found = json.loads(result.stdout)
    assert [(one["first_layer"], one["num_layers"]) for one in found] == [(0, 1), (1, 1), (0, 2)]
    assert found[-1]["efficient"]
    shown = blocktune("intervals", "--model", model, "--input", questions, "--limit", 1).stdout
    assert shown.split()[:5] == ["first_layer", "ratio", "layers", "divergence", "agreement"]
    assert "100%" in shown


@pytest.mark.parametrize("command", ["answer", "merge"])
def test_help_shows_that_a_revision_can_be_pinned(blocktune, command):
    """Brackets are markup to the help unless they are escaped."""
    assert "USER/NAME[@REVISION]" in "".join(blocktune(command, "--help").stdout.split())
