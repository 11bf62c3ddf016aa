"""The study's page: its tables and figures from results, and the whole from a model."""

import json
from dataclasses import replace
from pathlib import Path

import page_tables
import pytest
from engine.served import ASK
from evaluation.fake_results import fake_results, fake_rows, fake_suite
from observe import CLAIMS, METHODS, kept, main

from blocktune.data import RagExample
from blocktune.evaluation.report import style
from blocktune.evaluation.results import build_results
from blocktune.evaluation.suite import load_suite

SUITES = [p for p in Path("eval/study/suites").glob("*.yaml") if not p.stem.startswith("traces")]


def test_the_page_has_every_observation_with_its_numbers(tmp_path, capsys):
    data = tmp_path / "asked.jsonl"
    example = RagExample(ASK.question, ASK.chunks, ("Noel Fisher",)).to_json()
    data.write_text("".join(json.dumps(example | {"id": str(i)}) + "\n" for i in range(2)))
    folders = ["--output", str(tmp_path / "run"), "--results", str(tmp_path / "page")]
    ask = ["--model", "data/tiny", "--data", str(data), "--limit", "2", *folders]
    assert main([*ask, "--states", "1"]) == 0, capsys.readouterr().err
    text = (tmp_path / "page/README.md").read_text()
    assert all(f"## {'Observation ' if n < 8 else 'Takeaway '}" in text for n in CLAIMS)
    assert all(f"| {name} |" in text for name in METHODS)
    assert "| link0 over naive |" in text
    assert "No tuned weights were given" in text
    assert str(tmp_path) not in text
    assert {p.name for p in (tmp_path / "page").glob("*.png")} == {
        *(f"figure-{number}.png" for number in (3, 4, 5)),
        *("cost.png", "beginnings.png"),
    }
    choice = json.loads((tmp_path / "page/observations.json").read_text())["methods"]["naive"]
    assert len(choice["fidelity"]["choice"]["beginnings"]) == 4


def test_what_is_not_there_is_said_in_one_line(tmp_path, capsys):
    ask = [
        "--model",
        "data/tiny",
        "--data",
        "none.jsonl",
        "--output",
        str(tmp_path),
        "--results",
        "x",
    ]
    for more, word in ((["--adapter", "folder"], "LABEL=FOLDER"), ([], "none.jsonl")):
        assert main([*ask, *more]) == 2
        said = capsys.readouterr().err
        assert word in said
        assert said.count("\n") == 1


def test_every_number_of_a_pair_is_that_of_the_results():
    minus = fake_results()["methods"]["kvlink"]["score_minus"]["naive"]
    low, high = (f"{100 * end:+.1f}" for end in minus["ci95"])
    row = f"| kvlink over naive | +23.5 ({low} to {high}) | {minus['p_holm']:.2g} | 400 | differs |"
    assert row in page_tables.pairs(fake_results(), [("kvlink", "naive")])
    with pytest.raises(ValueError, match="no method 'x' in these results"):
        page_tables.pairs(fake_results(), [("kvlink", "x")])


def test_what_is_kept_is_small_and_names_no_machine():
    results = json.loads(json.dumps(fake_results()))
    results["provenance"] |= {"command": "blocktune eval --model /home/me/m"}
    small = kept(results)
    assert small["provenance"]["command"] == "blocktune eval --model m"
    assert len(json.dumps(small)) < len(json.dumps(results)) / 2
    kvlink, before = (found["methods"]["kvlink"] for found in (small, results))
    assert kvlink["score_minus"] == before["score_minus"]
    assert results["methods"]["kvlink"]["tasks"]["2-hop"]["score_minus"]  # what was read stays


def test_without_times_a_table_of_scores_shows_operations():
    full, naive = (
        [replace(row, usage={"flops": flops}) for row in fake_rows()[label]]
        for label, flops in (("full-prefill", 400), ("naive", 100))
    )
    rows = {"full-prefill": full, "naive": naive}
    results = build_results(fake_suite(), fake_rows() | rows, {}, {"command": "test", "seed": 0})
    lines = page_tables.scores(results, ["full-prefill", "naive", "kvlink"]).splitlines()
    assert lines[0].endswith("| recomputed | FLOPs, of full | gap recovered |")
    spent = [line.split(" | ")[-2] for line in lines[2:]]
    assert spent == ["1.00x", "0.25x", "-"]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_studys_suites_load(path):
    assert load_suite(path).methods
    assert path.read_text().startswith(f"# blocktune eval --suite {path.as_posix()} ")


def test_names_of_points_do_not_overlap():
    points = [(x / 4, 0.5 + y / 50, f"method {x} {y}") for x in range(4) for y in range(5)]

    def draw(figure, ground):
        axes = figure.subplots()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        style.label_points(axes, ground, points)
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
        assert len(boxes) == len(points)
        pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
        assert not any(a.overlaps(b) for a, b in pairs)
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)

    style.to_svg(draw, style.LIGHT, height=5, width=6)
