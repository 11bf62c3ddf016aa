"""Parameters are chosen on held-out questions, resumably, by one process or several."""

import json
from pathlib import Path

import pytest
from evaluation.test_runner import make_engine

from blocktune.evaluation.sweep import load_tuning, parse_tuning, refuse_test, tune

TASK = {"name": "dev", "source": "worlds:dev?seed=1&n=4&passages=2&kinds=self-contained"}
RECORD = {
    "model": "random",
    "method": "naive + first-k",
    "grid": {"select.first-k.k": [0, 2]},
    "task": TASK | {"max_new_tokens": 2, "metric": "f1"},
}
ENTRY = {"name": "first-k", "preset": "naive", "select": {"first-k": {}}}


def spec(**changes):
    return parse_tuning(RECORD | {"method": ENTRY} | changes, "t.yaml")


def test_a_grid_names_parameters_of_presets_axes_and_layouts():
    grid = {"blanks": [1, 3], "temperature": [0.8, 0.9]}
    points = list(spec(method="psr", grid=grid).points())
    assert [point.label for point in points][:2] == [
        "blanks=1,temperature=0.8",
        "blanks=1,temperature=0.9",
    ]
    assert points[0].entry == {"name": "psr", "params": {"blanks": 1, "temperature": 0.8}}
    mixed = {"budget": [0.1], "layout.num_blanks": [1], "k": [4]}
    [point] = spec(method="epic", grid=mixed).points()
    assert point.entry == {
        "name": "epic",
        "budget": 0.1,
        "layout": {"num_blanks": 1},
        "params": {"k": 4},
    }
    [point] = spec(method="naive", grid={"select": ["deviation"], "layer_budget": [0.1]}).points()
    assert point.entry == {"name": "naive", "select": "deviation", "layer_budget": 0.1}


def test_a_folder_may_be_a_value():
    points = spec(method="cacheclip", grid={"auxiliary": ["out/a", "out/b"]}).suite().methods
    assert [point.label for point in points] == ["auxiliary=out_a", "auxiliary=out_b"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"method": 1.5}, "t.yaml: method: must be a mapping of keys to values, got 1.5"),
        ({"method": "epic", "grid": {5: [1]}}, "'epic' takes k, .* got unknown 5"),
        ({"grid": {}}, "t.yaml: grid must name at least one parameter"),
        ({"method": "epic", "grid": {"k": [1, 1]}}, "grid 'k': value '1' is given 2 times; try"),
        ({"grid": {"k": 3}}, "grid 'k': must be a list with at least one entry, got 3"),
        ({"method": "epic", "grid": {"kk": [3]}}, "'epic' takes k, .* got unknown kk"),
        ({"method": "epic", "grid": {"k": [-1]}}, "k must be .* at least 0"),
        ({"method": "telepathy", "grid": {"k": [1]}}, "unknown reuse method 'telepathy'"),
        ({"methd": "epic"}, "t.yaml: unknown key 'methd'; known: model, method, grid, task"),
        ({"task": TASK | {"source": "worlds:test?n=3"}}, "'worlds:test.n=3' is a test split"),
    ],
)
def test_mistakes_are_one_clear_line(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        spec(**changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source", ["worlds:test?n=3", "hf:a/b?split=test", "data/test.jsonl", "out/musique-test.jsonl"]
)
def test_a_test_split_is_refused_by_any_name(source):
    with pytest.raises(ValueError, match="is a test split; parameters are tuned on held-out"):
        refuse_test(source)
    refuse_test("worlds:dev?n=3")
    refuse_test("runs/test_of_mine/contest.jsonl")


def test_the_best_point_is_the_first_of_all_and_a_second_run_asks_nothing(tmp_path):
    engine = make_engine()
    found = tune(spec(), tmp_path, command=["test"], load=lambda *_: engine)
    assert json.loads((tmp_path / "tuned.json").read_text()) == found
    assert found["best"] == found["points"][0]
    ranked = [(-point["score"], point["recompute_ratio"]) for point in found["points"]]
    assert ranked == sorted(ranked)
    assert {point["values"]["select.first-k.k"] for point in found["points"]} == {0, 2}
    assert engine.answered == 2 * 4
    again = make_engine()
    assert tune(spec(), tmp_path, command=["test"], load=lambda *_: again)["best"] == found["best"]
    assert again.answered == 0


@pytest.mark.parametrize("path", sorted(Path("eval/tuning").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_runs_load(path):
    assert list(load_tuning(path).points())
    assert path.read_text().startswith("# blocktune tune --config ")
