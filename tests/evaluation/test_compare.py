"""Two runs side by side, over the questions that both answered."""

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from evaluation.fake_results import fake_results, fake_rows
from rich.console import Console

from blocktune.evaluation.compare import compare, compare_table, load_results, verdict
from blocktune.evaluation.rows import RowFile
from blocktune.files import replace_json


def write_run(folder, rows) -> None:
    for label, own in rows.items():
        (folder / "rows").mkdir(parents=True, exist_ok=True)
        file = RowFile(folder / "rows", label, [row.key for row in own])
        file.append(own)
        file.merge()
    results = json.loads(json.dumps(fake_results()))
    for label, own in rows.items():
        results["methods"][label]["n"] = len(own)
    replace_json(folder / "results.json", results)


@pytest.fixture
def runs(tmp_path):
    rows = fake_rows()
    write_run(tmp_path / "a", rows)
    better = {**rows, "naive": rows["kvlink"][:300]}  # fewer questions, other answers
    write_run(tmp_path / "b", better)
    return tmp_path / "a", tmp_path / "b"


def test_seeds_that_stand_together_are_compared_together(tmp_path):
    rows, results = fake_rows(), json.loads(json.dumps(fake_results()))
    members = {"block-attention": 0.84, "kvlink": 0.86}
    results["methods"] = {"tuned": {"seeds": members}, "naive": {"seeds": {}}}
    for name, own in (("a", rows), ("b", rows | {"kvlink": rows["naive"]})):
        write_run(tmp_path / name, own)
        replace_json(tmp_path / name / "results.json", results)
    tuned, naive = compare(tmp_path / "a", tmp_path / "b")
    lost = [a.score - b.score for a, b in zip(rows["kvlink"], rows["naive"], strict=True)]
    assert (tuned.label, naive.mean) == ("tuned", 0)
    assert tuned.mean == pytest.approx(-sum(lost) / 400 / 2)


def test_a_method_is_compared_on_shared_questions(runs):
    changes = {change.label: change for change in compare(*runs)}
    naive, kvlink = changes["naive"], changes["kvlink"]
    assert naive.n == 300
    rows = fake_rows()
    wins = sum(b.em > a.em for a, b in zip(rows["naive"], rows["kvlink"][:300], strict=False))
    assert (naive.wins, naive.losses) == (wins, 0)
    assert naive.mean == pytest.approx(wins / 300)
    assert naive.ci95[0] > 0
    assert naive.p < naive.p_holm < 0.05
    assert (kvlink.mean, kvlink.p, kvlink.n_needed) == (0, 1, None)


def test_rows_that_repeat_an_id_are_paired_by_their_prompt(tmp_path):
    first, second, *others = fake_rows()["naive"][:10]
    same = {"task": "worlds", "id": "q1"}
    first = replace(first, **same, prompt_hash="one", score=1.0)
    second = replace(second, **same, prompt_hash="two", score=0.0)
    for name, own in (("a", (first, second)), ("swapped", (second, first)), ("b", (second,))):
        write_run(tmp_path / name, {"naive": [*own, *others]})
        results = json.loads((tmp_path / name / "results.json").read_text())
        results["methods"] = {"naive": results["methods"]["naive"]}
        replace_json(tmp_path / name / "results.json", results)
    for name, n in (("swapped", 10), ("b", 9)):
        [change] = compare(tmp_path / "a", tmp_path / name)
        assert (change.n, change.wins, change.losses) == (n, 0, 0), name


def test_means_of_seeds_that_differ_in_the_last_bit_are_the_same(tmp_path):
    rows = fake_rows()["naive"][:10]
    write_run(tmp_path / "a", {"naive": [replace(row, score=0.1 + 0.2) for row in rows]})
    write_run(tmp_path / "b", {"naive": [replace(row, score=0.3) for row in rows]})
    for name in "ab":
        results = json.loads((tmp_path / name / "results.json").read_text())
        results["methods"] = {"naive": results["methods"]["naive"]}
        replace_json(tmp_path / name / "results.json", results)
    [change] = compare(tmp_path / "a", tmp_path / "b")
    assert (change.mean, change.p, change.wins, change.losses) == (0, 1, 0, 0)


@pytest.mark.parametrize("kept", [200, 399])
def test_a_folder_with_fewer_rows_than_its_results_is_refused(runs, kept):
    path = runs[0] / "rows" / "naive.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:kept]) + '{"key": "x", "ta')
    with pytest.raises(ValueError, match=f"has {kept} rows of 'naive', but its results.json.* 400"):
        compare(*runs)


def test_the_table_says_what_differs(runs):
    console = Console(width=80, record=True, file=io.StringIO())
    table = compare_table(compare(*runs), *runs)
    table.show(console)
    assert table.headings[1:3] == ("a", "b")
    text = console.export_text()
    assert "differs" in text
    assert "the same" in text
    assert max(map(len, text.splitlines())) <= 80


def test_runs_of_one_name_are_told_apart_by_their_paths():
    table = compare_table([], Path("out/llama/rag"), Path("out/qwen/rag"))
    assert table.headings[1:3] == ("out/llama/rag", "out/qwen/rag")


def test_verdicts_name_the_questions_that_are_missing():
    assert verdict(0.01, 0.4, 100, 5000) == "within chance; needs about 5,000 questions"
    assert verdict(0.01, 0.06, 100, 90) == "within chance"
    assert verdict(-0.2, 0.01, 100, 20) == "differs"
    assert verdict(0.0, 1.0, 100, None) == "the same"


def test_runs_that_do_not_compare_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match=r"no results\.json in"):
        load_results(tmp_path)
    texts = {"{}x": "results.json: not JSON", "[]": "no 'methods'", '{"methods": {}}': "no 'tasks'"}
    for text, message in texts.items():
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_results(tmp_path)
    other = fake_results() | {"methods": {"mine": {}}}
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "results.json").write_text(json.dumps(other))
    with pytest.raises(ValueError, match="share no method"):
        compare(runs[0], tmp_path / "c")
    for key, value in (("metric", "another"), ("version", 2)):
        results = json.loads(json.dumps(fake_results()))
        results["tasks"]["worlds"][key] = value
        replace_json(runs[1] / "results.json", results)
        with pytest.raises(ValueError, match=f"'worlds' has the {key} .* and {value} in"):
            compare(*runs)
