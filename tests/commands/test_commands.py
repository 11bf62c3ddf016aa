"""What each command does when all is well."""

import json
import sys

import pytest
import yaml

from blocktune.check import Check
from blocktune.data import load_examples
from blocktune.methods import available

SOURCE = "worlds:test?n=3&passages=2&kinds=self-contained"
ASK = ("--question", "Where was Anna born?", "--max-new-tokens", 3)
CHUNKS = ("--chunk", "Anna Belt was born in Port Alder.", "--chunk", "Port Alder is in Lorne.")


@pytest.fixture
def questions(blocktune, tmp_path):
    path = tmp_path / "questions.jsonl"
    done = blocktune("data", "write", SOURCE, "-o", path)
    assert done.exit_code == 0, done.output
    return path


@pytest.fixture
def ask(blocktune, model):
    """Answers one question and returns the record of it."""

    def run(*options) -> dict:
        done = blocktune("answer", "--model", model, *ASK, *CHUNKS, "--json", *options)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return run


def read(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_methods_are_listed_for_programs_and_people(blocktune):
    listed = json.loads(blocktune("methods", "--json").stdout)
    methods = [entry for entry in listed if entry["kind"] == "method"]
    assert [entry["name"] for entry in methods] == available()
    assert all(entry["summary"] and entry["source"].startswith("http") for entry in methods)
    kinds = {"method", "selector", "repair", "reshape", "layout"}
    assert {entry["kind"] for entry in listed} == kinds
    lines = blocktune("methods").stdout.splitlines()
    assert max(map(len, lines)) <= 80
    starts = {line.split()[0] for line in lines if line.startswith("  ") and line[2] != " "}
    assert {entry["name"] for entry in listed} <= starts


def test_methods_can_be_listed_by_name(blocktune, refused):
    text = blocktune("methods", "epic", "first-k").stdout
    assert "epic  k=16" in text
    assert "https://arxiv.org/abs/2410.15332" in text
    assert "cacheblend" not in text
    assert "must be one of a3, " in refused("methods", "nonsense")


def test_worlds_are_what_the_source_of_that_name_gives(questions):
    assert load_examples(questions) == load_examples(SOURCE)


def test_one_question_is_answered_with_its_usage(blocktune, ask, model):
    record = ask()
    usage = record["usage"]
    assert record.keys() == {"id", "question", "answer", "method", "usage"}
    assert record["id"] is None
    assert record["method"] == "naive"
    assert usage["chunk_misses"] == 2
    assert usage["recompute_ratio"] == 0
    assert usage["ttft_s"] == pytest.approx(sum(usage["ttft"].values()))
    panel = blocktune("answer", "--model", model, *ASK, *CHUNKS, "--method", "full-prefill").stdout
    assert "100.0%" in panel
    assert "Where was Anna born?" in panel


def test_what_is_known_of_the_chunks_stands_in_the_record(blocktune, model, tmp_path):
    path = tmp_path / "q.jsonl"
    chunks = [{"text": "Kirby is small.", "id": "d7"}, "Nothing."]
    path.write_text(json.dumps({"question": "Where?", "chunks": chunks}))
    done = blocktune("answer", "--model", model, "-i", path, "--max-new-tokens", 1, "--json")
    assert json.loads(done.stdout)["chunks"] == [{"id": "d7"}, {}]


def test_a_stream_says_what_the_answer_says(blocktune, ask, model):
    whole = ask("--method", "cacheblend")["answer"]
    assert whole
    stream = ("answer", "--model", model, *ASK, *CHUNKS, "--method", "cacheblend", "--stream")
    assert blocktune(*stream).stdout == whole + "\n"


def test_a_parameter_changes_the_method(ask):
    usages = [ask("--method", "epic", "--param", f"k={k}")["usage"] for k in (1, 3)]
    assert [usage["layer_tokens"] for usage in usages] == [[2, 2], [6, 6]]


def test_the_prompt_is_shown_row_by_row_in_its_wording(blocktune, model, tmp_path):
    show = ("answer", "--model", model, *ASK, *CHUNKS, "--show-prompt")
    shown = blocktune(*show).stdout
    assert "[chunk 0: " in shown
    assert "[query: " in shown
    assert "Port Alder is in Lorne." in shown
    path = tmp_path / "format.yaml"
    path.write_text("instruction: From the file.\nquestion: 'Now: {question}'\n")
    words = ("--format", path, "--system", "Be brief.")
    shown = blocktune(*show, *words).stdout
    assert all(text in shown for text in ("From the file.", "Now: Where was", "Be brief."))
    shown = blocktune(*show, *words, "--instruction", "From the line.").stdout
    assert "From the line." in shown
    assert "From the file." not in shown


def test_encoded_chunks_are_found_again_by_another_engine(blocktune, model, questions, tmp_path):
    store = ("--store", tmp_path / "store")
    encode = ("encode", "--model", model, "--input", questions, *store)
    assert "encoded 6 chunks" in blocktune(*encode).stdout
    worded = ("--system", "Be brief.")  # only the prefix of a prompt depends on it
    assert "6 were already there" in blocktune(*encode, *worded).stdout
    output = tmp_path / "answers.jsonl"
    ask = ("answer", "--model", model, "-i", questions, "--max-new-tokens", 2, *store, "-o")
    done = blocktune(*ask, output, *worded)
    assert done.stdout == f"wrote 3 answers to {output}\n"
    assert f" chunks read from {store[1]}, 0 encoded" in done.stderr
    assert "with the prompts' starts" in done.stderr
    records = read(output)
    assert [r["id"] for r in records] == [e.id for e in load_examples(questions)]
    assert all(r["usage"]["chunk_misses"] == 0 for r in records)
    other = blocktune(*ask, tmp_path / "other.jsonl", "--dtype", "bfloat16").stderr
    assert "\n0 chunks read" in f"\n{other}"
    assert "chunks are other passages, or of another model" in other


def test_a_stopped_answer_continues(blocktune, refused, model, tmp_path, monkeypatch):
    from blocktune.engine import Engine

    path, answer = tmp_path / "a.jsonl", Engine.answer
    ask = ("answer", "--model", model, "-i", SOURCE, "--max-new-tokens", 2, "--batch-size", 1)
    ask += ("--method", "naive", "-o", path)
    calls = []

    def stopped(engine, examples, *arguments, **options):
        calls.append(examples[0].id)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return answer(engine, examples, *arguments, **options)

    monkeypatch.setattr(Engine, "answer", stopped)
    done = blocktune(*ask)
    assert done.exit_code == 130
    assert "repeat the command to continue" in done.stderr
    first = read(path)
    assert len(first) == 2
    path.write_text(path.read_text() + '{"id"')  # a line that a crash left half-written
    assert "wrote 1 answers" in blocktune(*ask).stdout
    assert read(path)[:2] == first
    assert calls == [*(r["id"] for r in first), calls[2], calls[2]]
    assert "3 were already there" in blocktune(*ask).stdout
    whole = path.read_bytes()
    # The last of an option that is repeated counts.
    for other in (
        ("--system", "S"),
        ("--max-new-tokens", 3),
        ("--method", "epic"),
        ("--limit", 2),
        ("-i", f"{SOURCE}&seed=9"),
    ):
        assert "not an answer of this command" in refused(*ask, *other)
    assert path.read_bytes() == whole


def test_drawn_answers_continue_in_the_same_batches(blocktune, model, tmp_path):
    ask = ("answer", "--model", model, "-i", SOURCE, "--max-new-tokens", 4, "--batch-size", 2)
    ask += ("--temperature", 1.0, "-o")
    blocktune(*ask, tmp_path / "whole.jsonl")
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "part.jsonl").write_text(lines[0])
    assert "wrote 3 answers" in blocktune(*ask, tmp_path / "part.jsonl").stdout
    answers = [[r["answer"] for r in read(tmp_path / f"{n}.jsonl")] for n in ("whole", "part")]
    assert answers[0] == answers[1]


def test_batches_of_drawn_answers_draw_different_numbers(blocktune, model, tmp_path):
    row = {"question": "Where was Anna born?", "chunks": ["Anna was born in Port Alder."]}
    questions = tmp_path / "same.jsonl"
    questions.write_text(f"{json.dumps(row)}\n" * 4)
    ask = ("answer", "--model", model, "-i", questions, "--max-new-tokens", 8, "--batch-size", 2)
    for more in ((), ("--response-cache", "exact")):  # without a seed nothing is recalled
        lines = blocktune(*ask, "--temperature", 3.0, *more, "--json").stdout.splitlines()
        assert len({json.loads(line)["answer"] for line in lines}) == 4


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
    names = ["results.json", "results.png", "rows", "ttft.json"]
    assert sorted(path.name for path in output.iterdir()) == names


def test_bench_gives_the_ratios(small_benches, blocktune, tmp_path):
    arguments = ("--tokens", 256, "--chunk", 64, "--repeats", 1, "--json")
    path = tmp_path / "made" / "bench.json"
    found = json.loads(blocktune("bench", "attention", *arguments, "--output", path).stdout)
    assert found["split_over_full"] > 0
    assert found["split_over_dense"] > 0
    assert json.loads(path.read_text()) == found


def test_a_folder_for_numbers_is_refused_before_they_are_measured(refused, monkeypatch, tmp_path):
    monkeypatch.setattr("blocktune.bench.attention.bench_attention", None)
    assert "is a directory" in refused("bench", "attention", "--output", tmp_path)


def test_check_says_whether_reuse_is_sound(blocktune, model):
    done = blocktune("check", "--model", model, "--json")
    checks = json.loads(done.stdout)["checks"]
    assert len(checks) >= 4
    assert all(check.keys() == {"name", "passed", "max_abs_diff", "tolerance"} for check in checks)
    assert done.exit_code == 0 if all(check["passed"] for check in checks) else 1


def test_check_shows_a_verdict_a_line(blocktune, model, monkeypatch):
    found = [("same", True, 1e-6, 1e-4), ("seen", True, 3.0, 0.5), ("wrong", False, 2.0, 1e-4)]
    found += [("unseen", False, 0.1, 0.5), ("overflow", False, float("nan"), 0.5)]
    checks = [Check(*one) for one in found]
    monkeypatch.setattr("blocktune.check.check_model", lambda engine: checks)
    lines = [line.split() for line in blocktune("check", "--model", model).stdout.splitlines()]
    assert lines[2:7] == [
        ["ok", "same", "1.0e-06", "1.0e-04"],
        ["ok", "seen", "3.0e+00", "at", "least", "5.0e-01"],
        ["FAILED", "wrong", "2.0e+00", "1.0e-04"],
        ["FAILED", "unseen", "1.0e-01", "at", "least", "5.0e-01"],
        ["FAILED", "overflow", "nan", "5.0e-01"],
    ]


@pytest.mark.parametrize(
    ("command", "worker"),
    [
        (("replay", "zipf", "--output", "out"), "replay.replay"),
        (("bench", "ttft", "--model", "data/tiny", "--picture", "a.png"), "ttft.bench_ttft"),
    ],
)
def test_plots_need_their_package_before_anything_is_measured(
    refused, monkeypatch, tmp_path, command, worker
):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(f"blocktune.bench.{worker}", None)
    *words, path = command
    line = refused(*words, tmp_path / path)
    assert "this needs the package 'matplotlib'; run pip install 'blocktune[eval]'" in line
    assert not list(tmp_path.iterdir())


def test_layer_ranges_are_profiled(blocktune, model, questions):
    profile = ("--model", model, "--input", questions)
    found = json.loads(blocktune("profile-layers", *profile, "--json").stdout)
    assert [(one["first_layer"], one["num_layers"]) for one in found] == [(0, 1), (1, 1), (0, 2)]
    assert found[-1]["efficient"]
    shown = blocktune("profile-layers", *profile, "--limit", 1)
    headings = ["first_layer", "ratio", "layers", "divergence", "agreement"]
    assert shown.stdout.split()[:5] == headings
    assert "100%" in shown.stdout


@pytest.mark.parametrize("command", ["answer", "merge"])
def test_help_shows_that_a_revision_can_be_pinned(blocktune, command):
    """Brackets are markup to the help unless they are escaped."""
    shown = "".join(blocktune(command, "--help").stdout.replace("│", "").split())
    assert "USER/NAME[@REVISION]" in shown
