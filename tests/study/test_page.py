"""The page of findings: tables and figures are those of the results, the prose is hand-written."""

import json
import re
from dataclasses import replace
from itertools import chain
from pathlib import Path

import matplotlib as mpl
import page_figures
import pytest
import yaml
from evaluation.fake_results import METHODS, fake_results, fake_rows, fake_suite
from matplotlib.figure import Figure
from page_tables import TABLES
from refresh_page import BLOCK, kept, main, refresh, refreshed
from study.test_traces import cell
from traces import load_traces, summed_up

from blocktune.evaluation.report import style
from blocktune.evaluation.stats.results import build_results
from blocktune.evaluation.suite import load_suite
from blocktune.files import replace_json

STUDY = Path("eval/results/worlds/STUDY.md")
SUITES = [p for p in Path("eval/study/suites").glob("*.yaml") if not p.stem.startswith("traces")]
CHOICE = {
    "beginnings": [0.0, 0.5, 0.25],
    "first_share": 0.2,
    "overlap": [[0, 0, 0], [0, 1, 0.5], [0, 0.4, 1]],
    "constant": 0.125,
    "accrued": [0.0, 0.6, 0.7],
}
FIDELITY = {"kl": 0.25, "top1": 0.9, "keys": [0.0, 1.0, 3.0], "values": [0.0, 2.0, 2.0]}


def write_runs(folder: Path) -> None:
    """A run of methods and one of traces."""
    results = json.loads(json.dumps(fake_results()))
    for summary in results["methods"].values():
        summary["fidelity"] = FIDELITY | {"entropy": [1.0, 2.0, 4.0], "choice": CHOICE}
    results["methods"]["kvlink"]["seeds"] = {"kvlink-0": 0.8, "kvlink-1": 0.9}
    hardware = {"processor": "CPU", "cores": 2, "gpus": []}
    about = {"command": "blocktune eval --model /home/me/m", "commit": "a" * 40}
    results["provenance"] |= about | {"hardware": hardware}
    cells = summed_up([cell("naive", [0.0] * 20), cell("cacheblend", [1.0] * 20)], {}, 0)
    traces = {"traces": {"mixed": {"cells": cells}}, "provenance": results["provenance"]}
    replace_json(folder / "a" / "results.json", results)
    replace_json(folder / "t" / "traces.json", traces)


def block(kind: str, keys: str, body: str = "") -> str:
    return f"<!-- {kind}: {{{keys}}} -->\n{body}<!-- end of {kind} -->"


@pytest.fixture
def page(tmp_path):
    """Makes a page of blocks beside two kept runs and returns its text."""
    write_runs(tmp_path / "out")

    def make(*blocks: str) -> str:
        path = tmp_path / "PAGE.md"
        path.write_text("\n\n".join(["Prose before.", *blocks, "Prose after: 12 %."]) + "\n")
        refresh(path, tmp_path / "out")
        return path.read_text()

    return make


def test_prose_stays_and_blocks_are_made_anew(page):
    keys = "show: scores, run: r/a, methods: [naive, kvlink]"
    text = page(block("table", keys, "an older table\n"), "*Prose* between.")
    assert text.startswith("Prose before.\n\n<!-- table: {show: scores, run: r/a, methods: ")
    assert text.endswith("<!-- end of table -->\n\n*Prose* between.\n\nProse after: 12 %.\n")
    assert "older" not in text
    heading, rule, naive, kvlink = text.splitlines()[3:7]
    kinds = "self-contained | cross-chunk | 2-hop | comparison"
    assert heading == f"| method | {kinds} | all | recomputed | TTFT, of full | gap recovered |"
    assert rule == "|---" * 9 + "|"
    assert naive.startswith("| naive | 94.0 ±4.8 | 52.0 ±")
    assert re.search(r"\| 0 % \| 0\.30x \| 95 % \(\d+ to \d+\) \|$", kvlink)


def test_every_number_of_a_pair_is_that_of_the_results(page):
    minus = fake_results()["methods"]["kvlink"]["score_minus"]["naive"]
    low, high = (f"{100 * end:+.1f}" for end in minus["ci95"])
    row = f"| kvlink over naive | +23.5 ({low} to {high}) | {minus['p_holm']:.2g} | 400 | differs |"
    assert row in page(block("table", "show: pairs, run: r/a, pairs: [[kvlink, naive]]"))


def test_every_kind_of_table_is_made(page):
    ways = dict.fromkeys(TABLES, "") | {"pairs": ", pairs: [[naive, epic]]"}
    run = {"traces": "t"}
    blocks = [block("table", f"show: {n}, run: r/{run.get(n, 'a')}{w}") for n, w in ways.items()]
    text = page(*blocks, block("table", "show: origin, run: r/t"))
    assert "| kvlink | 86.0 | 80.0, 90.0 |" in text
    assert "| naive | 0.25 | 90 % | 2 | 2 | 3 |" in text
    assert "| 1 | 50 % | 60 % | 100 % | 40 % |" in text
    assert "By chance 20 % would be first tokens; 12 % of a layer's choice is every" in text
    row = "| mixed | cacheblend | 100.0 ±8.1 | +100.0 (+73.5 to +100.0) | - | 0.0 | 50 % |"
    assert row in text
    assert "400 questions, 7 methods. Made by `blocktune eval --model m` at commit" in text
    assert "40 requests of 20 questions in each trace." in text


def test_every_kind_of_figure_is_drawn(page, tmp_path):
    about = "about: 'What: it shows'"
    ways = {
        "panels": "run: r/a",
        "cost": "run: r/a, by: ttft_s",
        "layers": "run: r/a, methods: [naive]",
        "overlap": "run: r/a",
        "trace": "run: r/t, pattern: mixed",
    }
    text = page(
        *(block("figure", f"show: {n}, {w}, file: r/{n}.png, {about}") for n, w in ways.items())
    )
    for name in ways:
        assert f"![What: it shows](r/{name}.png)" in text
        assert (tmp_path / f"r/{name}.png").stat().st_size > 5000


def test_what_is_kept_is_small_and_names_no_machine(tmp_path):
    write_runs(tmp_path)
    results = json.loads((tmp_path / "a/results.json").read_text())
    small = kept(results)
    assert small["provenance"]["command"] == "blocktune eval --model m"
    assert len(json.dumps(small)) < len(json.dumps(results)) / 2
    kvlink, before = (found["methods"]["kvlink"] for found in (small, results))
    assert kvlink["score_minus"] == before["score_minus"]
    assert kvlink["tasks"]["2-hop"]["score"] == before["tasks"]["2-hop"]["score"]
    assert results["methods"]["kvlink"]["tasks"]["2-hop"]["score_minus"]  # what was read stays


def test_a_run_without_results_is_named(tmp_path):
    path = tmp_path / "PAGE.md"
    path.write_text(block("table", "show: scores, run: r/later"))
    assert refresh(path, tmp_path) == ["r/later"]
    assert "*Not measured yet: there is no `r/later.json`.*" in path.read_text()
    assert refreshed(path.read_text(), path) == path.read_text()


def test_without_times_a_table_of_scores_shows_operations():
    full, naive = (
        [replace(row, usage={"flops": flops}) for row in fake_rows()[label]]
        for label, flops in (("full-prefill", 400), ("naive", 100))
    )
    rows = {"full-prefill": full, "naive": naive}
    results = build_results(fake_suite(), fake_rows() | rows, {}, {"command": "test", "seed": 0})
    lines = TABLES["scores"](results, ["full-prefill", "naive", "kvlink"]).splitlines()
    assert lines[0].endswith("| recomputed | FLOPs, of full | gap recovered |")
    spent = [line.split(" | ")[-2] for line in lines[2:]]
    assert spent == ["1.00x", "0.25x", "-"]


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (block("table", "show: odd, run: r/a"), "no table shows 'odd'; available: scores, f1"),
        (block("table", "run: r/a"), "a table lacks 'show'"),
        (block("figure", "show: panels, run: r/a, file: x.png"), "a figure lacks 'about'"),
        (block("table", "show: scores, run: r/a, methods: [x]"), "no method 'x' in these results"),
        (block("table", "show: scores, run: r/a, odd: 1"), "unexpected keyword argument 'odd'"),
    ],
)
def test_mistakes_are_one_clear_line(page, made, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        page(made)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", sorted(STUDY.parent.glob("*.md")), ids=lambda path: path.stem)
def test_a_page_s_tables_are_those_of_the_committed_results(path):
    text = path.read_text(encoding="utf-8")
    assert refreshed(text, path) == text, f"run `python eval/study/refresh_page.py {path}`"
    for found in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (path.parent / found).is_file()


def test_the_study_asks_for_methods_that_its_suites_have():
    """So that a long run does not end in a page that cannot be made."""
    labels = {}
    for path in SUITES:
        suite = load_suite(path)
        members = {one for pool in suite.pool.values() for one in pool}
        own = {spec.label for spec in suite.methods} - members
        labels[f"study/{path.stem}"] = own | set(suite.pool)
    traces = [load_traces(path) for path in Path("eval/study/suites").glob("traces*.yaml")]
    patterns = {pattern.name for suite in traces for pattern in suite.patterns}
    blocks = [match["keys"] for match in BLOCK.finditer(STUDY.read_text(encoding="utf-8"))]
    assert len(blocks) > 40
    for keys in map(yaml.safe_load, blocks):
        named = {*keys.get("methods", ()), *chain.from_iterable(keys.get("pairs", ()))}
        named |= {keys["method"]} if "method" in keys else set()
        assert named <= labels.get(keys["run"], set(METHODS)), keys
        assert keys.get("pattern", min(patterns)) in patterns


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.stem)
def test_the_studys_suites_load(path):
    assert load_suite(path).methods
    assert path.read_text().startswith(f"# blocktune eval --suite {path.as_posix()} ")


def test_the_command_says_what_is_missing_and_what_is_wrong(tmp_path, capsys):
    path = tmp_path / "PAGE.md"
    path.write_text(block("table", "show: scores, run: r/later"))
    assert main([str(path)]) == 0
    assert capsys.readouterr().out.endswith("not measured: r/later\n")
    for given, word in (
        (["README.md"], "no block of a table"),
        ([str(path), "--runs", str(tmp_path / "none")], "no folder of runs"),
    ):
        assert main(given) == 2
        assert word in capsys.readouterr().err


def drawn(monkeypatch, labels) -> Figure:
    """The figure, laid out as it is saved."""
    made = []

    def keep(draw, path, height, width):
        with mpl.rc_context(style._settings(style.LIGHT)):
            made.append(style._made(draw, style.LIGHT, (width, height)))
            made[0].draw_without_rendering()

    monkeypatch.setattr(style, "to_png", keep)
    cell = {"score": 0.5, "score_ci95": [0.4, 0.6]}
    tasks = {"self-contained": cell, "cross-chunk": cell, "2-hop": cell}
    summary = {"method": "naive", "tasks": tasks}
    page_figures.panels({"methods": dict.fromkeys(labels, summary)}, "x.png")
    return made[0]


@pytest.mark.parametrize("length", [3, 27, 54])
@pytest.mark.parametrize("count", [2, 9, 20])
def test_all_names_stay_inside_the_picture(monkeypatch, count, length):
    labels = [f"{i:02} {'recompute-aware + deviation' * 2}"[:length] for i in range(count)]
    figure = drawn(monkeypatch, labels)
    names = figure.axes[0].get_yticklabels()
    assert [name.get_text() for name in reversed(names)] == labels
    boxes = [name.get_window_extent() for name in names]
    assert all(box.x0 >= 0 and box.y0 >= 0 and box.y1 <= figure.bbox.y1 for box in boxes)
    panel = figure.axes[0].get_window_extent()
    assert panel.width > 0.1 * figure.bbox.width
    assert max(box.x1 for box in boxes) <= panel.x0


def test_names_of_points_do_not_overlap(monkeypatch):
    points = [(x / 4, 0.5 + y / 50, f"method {x} {y}") for x in range(4) for y in range(5)]
    with mpl.rc_context(style._settings(style.LIGHT)):
        figure = Figure(figsize=(6, 5), layout="constrained")
        axes = figure.subplots()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        style.label_points(axes, style.LIGHT, points)
        boxes = [text.get_window_extent() for text in axes.texts if text.get_text()]
    assert len(boxes) == len(points)
    pairs = [(a, b) for i, a in enumerate(boxes) for b in boxes[:i]]
    assert not any(a.overlaps(b) for a, b in pairs)
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
