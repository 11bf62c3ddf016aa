"""Results, table and picture: the same numbers, and nothing lost at the terminal's edge."""

import io
import json
import warnings

import pytest
from evaluation.fake_results import KINDS, METHODS, fake_results, fake_rows, fake_suite
from matplotlib.figure import Figure
from matplotlib.image import imread
from rich.console import Console

from blocktune.evaluation.compare import findings, power_notes
from blocktune.evaluation.report import style
from blocktune.evaluation.report.charts import draw_results
from blocktune.evaluation.report.terminal import results_table
from blocktune.evaluation.results import build_results
from blocktune.evaluation.runner import progress_bars
from blocktune.tables import Table

SCHEMA = {
    "em",
    "f1",
    "substring_em",
    "adjusted_f1",
    "ci95",
    "n",
    "n_kept",
    "recompute_ratio",
}


def test_results_hold_the_promised_schema():
    results = json.loads(json.dumps(fake_results(), allow_nan=False))
    assert list(results["methods"]) == list(METHODS)
    assert results["provenance"] == {
        **{"model": "data/tiny", "command": "test", "seed": 0, "ci95_of": "em"}
    }
    for summary in results["methods"].values():
        assert summary.keys() >= SCHEMA | {"ttft_s", "tasks"}
        assert list(summary["tasks"]) == list(KINDS)
        assert all(task.keys() >= SCHEMA for task in summary["tasks"].values())


def test_summaries_are_worked_by_hand():
    methods = fake_results()["methods"]
    naive, kvlink = methods["naive"], methods["kvlink"]
    assert naive["em"] == (0.94 + 0.52 + 0.44 + 0.60) / 4
    assert naive["n"] == 400
    assert naive["n_kept"] == 97 + 93 + 81 + 78
    assert naive["adjusted_f1"] == pytest.approx(250 / 349)  # naive is right on a subset of full's
    assert naive["score_gap_recovered"] == 0
    assert kvlink["score_gap_recovered"] == pytest.approx((344 - 250) / (349 - 250))
    assert kvlink["ttft_over_full_prefill"] == pytest.approx(0.3)
    assert naive["tasks"]["2-hop"]["em"] == pytest.approx(0.44)
    low, high = naive["tasks"]["2-hop"]["ci95"]
    assert low < 0.44 < high
    above = kvlink["score_minus"]["full-prefill"]
    assert above["mean"] == pytest.approx((344 - 349) / 400)
    assert above["ci95"][0] < above["mean"] < above["ci95"][1] < 0.001
    assert above["p"] == pytest.approx(2 / 2**5)  # five losses, no win


def test_without_baselines_what_needs_them_is_null():
    suite = fake_suite()
    tuned = [spec for spec in suite.methods if spec.label in ("kvlink", "block-attention")]
    object.__setattr__(suite, "methods", tuple(tuned))
    rows = {label: fake_rows()[label] for label in ("block-attention", "kvlink")}
    results = build_results(suite, rows, {}, {})
    summary = results["methods"]["kvlink"]
    assert summary["adjusted_f1"] is summary["n_kept"] is summary["ttft_s"] is None
    assert summary["score_gap_recovered"] is None
    assert results_table(results).rows[0][-1] == "-"


def test_several_tasks_name_their_kinds():
    suite = fake_suite()
    tasks = (suite.tasks[0], suite.tasks[0].__class__("plain", "x", by_kind=False))
    object.__setattr__(suite, "tasks", tasks)
    rows = fake_rows()
    for own in rows.values():
        for row in own[300:]:
            object.__setattr__(row, "task", "plain")
    tasks = build_results(suite, rows, {}, {})["methods"]["naive"]["tasks"]
    assert list(tasks) == ["worlds/cross-chunk", "worlds/2-hop", "worlds/comparison", "plain"]


def test_a_column_has_the_metric_of_its_task_whatever_the_tasks_name():
    suite = fake_suite()
    make = suite.tasks[0].__class__
    tasks = make("mine/v2", "x", metric="f1"), make("mine", "x", metric="rouge_l")
    object.__setattr__(suite, "tasks", tasks)
    rows = fake_rows()
    for own in rows.values():
        for index, row in enumerate(own):
            object.__setattr__(row, "task", "mine/v2" if index < 200 else "mine")
    table = results_table(build_results(suite, rows, {}, {}))
    assert [heading.split("\n")[-1] for heading in table.headings[1:5]] == ["F1", "F1"] + 2 * [
        "ROUGE-L"
    ]


def test_of_many_kinds_table_and_picture_show_the_mean(tmp_path):
    results = json.loads(json.dumps(fake_results()))
    for summary in results["methods"].values():
        summary["tasks"] = {f"kind {n}": summary["tasks"]["2-hop"] for n in range(30)}
    table = results_table(results)
    assert table.headings[1] == "all\nEM"
    assert {row[0]: row[1] for row in table.rows}["naive"] == "62.5 ±5"
    with warnings.catch_warnings(action="error"):  # matplotlib warns if panels have no room
        draw_results(results, tmp_path / "figure.png")


@pytest.mark.parametrize("width", [80, 60, 120])
def test_no_column_of_the_table_is_cut(width):
    console = Console(width=width, record=True, file=io.StringIO())
    results_table(fake_results()).show(console)
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    lines = [line.split() for line in text.splitlines() if line.strip()]
    numbers = " ".join(" ".join(line[1:]) for line in lines if line[0] == "kvlink")
    assert numbers == "97.0 ±4 92.0 ±5 79.0 ±8 76.0 ±8 98.6 0 % 12.0 0.30x 95 %"
    assert set(METHODS) <= {line[0] for line in lines}


def test_a_long_name_leaves_room_for_the_numbers():
    console = Console(width=80, record=True, file=io.StringIO())
    name = "kvlink + deviation 15 % at 40 % of the layer-tokens, over a second adapter, seed 0"
    Table(("method", "score", "gap"), [(name, "62.5 ±5", "100 %")]).show(console)
    lines = console.export_text().splitlines()
    assert lines[0].split() == ["method", "score", "gap"]
    assert any(line.endswith("62.5 ±5  100 %") for line in lines)
    assert max(map(len, lines)) <= 80


def test_a_bar_in_a_name_makes_no_column_of_markdown():
    assert Table(("method", "score"), [("a|b", "1.0")]).markdown().endswith("| a\\|b | 1.0 |")


def test_names_in_any_script_are_drawn_without_a_warning(tmp_path):
    results = json.loads(json.dumps(fake_results()))
    tasks = {"讨论": "2-hop"}
    for summary in results["methods"].values():
        summary["tasks"] = {name: summary["tasks"][kind] for name, kind in tasks.items()}
    with warnings.catch_warnings(action="error"):
        draw_results(results, tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_names_with_dollars_are_no_formulas():
    def draw(figure, ground):
        figure.suptitle("1 $ to {2_^ $")

    assert b"<!-- 1 $ to {2_^ $ -->" in style.to_svg(draw, style.LIGHT, 1)


def test_a_loss_of_more_than_the_gap_is_not_written_as_a_share_of_it():
    results = json.loads(json.dumps(fake_results()))
    gaps = {"no-context": -6.58, "naive": 0.0, "epic": -0.4, "cacheblend": -1.0, "kvlink": 1.2}
    for label, gap in gaps.items():
        results["methods"][label]["score_gap_recovered"] = gap
    cells = {row[0]: row[-1] for row in results_table(results).rows}
    shown = [cells[label] for label in gaps]
    assert shown == ["< -100 %", "0 %", "-40 %", "-100 %", "120 %"]
    assert any(one.startswith("epic closes none of that gap") for one in findings(results))


def test_names_in_brackets_are_no_markup():
    console = Console(width=80, record=True, file=io.StringIO())
    names = ("[bold]x", "a[k]b", "t[x]", "n[/y]", "m[z]")
    Table((names[4], "n"), [(names[0], "1"), (names[1], "2")], names[2], names[3]).show(console)
    with progress_bars(console) as bars:
        bars.add_task("l[w]")
    text = console.export_text()
    assert [name for name in (*names, "l[w]") if name not in text] == []


def test_findings_say_gaps_with_intervals_and_what_is_chance():
    sentences = findings(fake_results())
    assert len(sentences) == 1 + 4 + 1
    assert sentences[0].startswith("Naive reuse loses 24.8 (")
    assert "41.0 on cross-chunk, 37.0 on 2-hop" in sentences[0]
    assert sentences[2].startswith("kvlink closes 95 % (")
    cost = ") of that gap, recomputing nothing, first token after 0.30 of full prefill's time."
    assert sentences[2].endswith(cost)
    assert "recomputing 15 % of the context" in sentences[3]
    assert sentences[5].startswith("kvlink minus block-attention: 2.0 (")
    assert "chance" not in sentences[5]


def test_a_difference_within_chance_is_called_so():
    results = json.loads(json.dumps(fake_results()))
    results["methods"]["kvlink"]["score_minus"]["block-attention"]["p_holm"] = 0.2
    assert findings(results)[5].endswith(": within chance at this number of questions.")
    del results["methods"]["naive"]
    assert findings(results) == []


@pytest.mark.parametrize("timed", [True, False])
def test_the_picture_is_drawn_with_and_without_times(tmp_path, timed):
    results = json.loads(json.dumps(fake_results()))
    if not timed:
        for summary in results["methods"].values():
            summary["ttft_over_full_prefill"] = None
    path = draw_results(results, tmp_path / "sub" / "figure.png")
    picture = imread(path)
    assert picture.shape[0] > 500
    assert picture.shape[1] > 1200
    assert [p.name for p in path.parent.iterdir()] == ["figure.png"]


def test_the_picture_is_headed_by_the_metric(monkeypatch):
    results = json.loads(json.dumps(fake_results()))
    results["tasks"]["worlds"]["title"] = "sub-EM"
    figure = Figure(figsize=(12, 4))
    monkeypatch.setattr(style, "to_png", lambda draw, *rest: draw(figure, style.LIGHT))
    draw_results(results, "", "quick")
    assert figure.get_suptitle() == "sub-EM: quick"


def test_a_picture_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyError):
        draw_results({"methods": {"naive": {"tasks": {"2-hop": {}}}}}, tmp_path / "figure.png")
    assert list(tmp_path.iterdir()) == []


def test_of_many_methods_only_the_front_is_worth_a_sentence():
    results = json.loads(json.dumps(fake_results()))  # shared by all tests
    baselines = ("full-prefill", "naive", "no-context")
    labels = [n for n, m in results["methods"].items() if m["method"] not in baselines]
    for number in range(9):
        results["methods"][f"copy {number}"] = results["methods"][labels[0]]
    loss, *gains, rest = findings(results)
    front = [n for n in results["budget"]["pareto"]["recompute_ratio"] if n in labels]
    assert loss.startswith("Naive reuse loses")
    assert [gain.split(" closes")[0] for gain in gains] == front
    assert rest.startswith(f"{len(labels) + 9 - len(front)} other methods score no higher")


def test_what_the_verdict_calls_chance_is_no_loss():
    """A difference whose own interval is above 0 is not called a loss where Holm's p is not."""
    results = json.loads(json.dumps(fake_results()))
    lost = results["methods"]["full-prefill"]["score_minus"]["naive"]
    lost |= {"mean": 0.125, "ci95": [0.025, 0.225], "p": 0.03, "p_holm": 0.3, "n_needed": 900}
    results["methods"]["naive"]["score_minus"]["full-prefill"] |= {
        "mean": -0.125,
        "p_holm": 0.3,
        "n_needed": 900,
    }
    first, *rest = findings(results)
    assert "12.5 (2.5 to 22.5)" in first
    assert "within chance" in first
    assert "loses" not in first
    assert not any("closes" in sentence for sentence in rest)
    assert any("naive (-12.5 points; 900 would be enough)" in note for note in power_notes(results))
