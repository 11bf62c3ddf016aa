"""`blocktune eval compare` and `report` on finished runs."""

import json

import pytest
import yaml

from blocktune.commands.evaluate import at_one_budget
from blocktune.evaluation.suite import parse_suite

WORLDS = "worlds:test?seed=1&n=4&passages=2&kinds=self-contained"


@pytest.fixture(scope="module")
def suite(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("suite") / "suite.yaml"
    task = {"name": "worlds", "source": WORLDS, "max_new_tokens": 2}
    record = {"model": model, "methods": ["full-prefill", "naive"], "tasks": [task]}
    path.write_text(yaml.safe_dump(record | {"ttft": {"num": 1}, "fidelity": {"num": 1}}))
    return path


def test_runs_are_compared_and_reported(blocktune, suite, tmp_path):
    for name in ("a", "b"):
        done = blocktune("eval", "--suite", suite, "--output", tmp_path / name)
        assert done.exit_code == 0, done.output
    compare = ("eval", "compare", tmp_path / "a", tmp_path / "b")
    changes = json.loads(blocktune(*compare, "--json").stdout)
    assert [(c["label"], c["mean"], c["n"]) for c in changes] == [
        ("full-prefill", 0, 4),
        ("naive", 0, 4),
    ]
    assert "the same" in blocktune(*compare).stdout
    assert blocktune("eval", "report", tmp_path / "a").exit_code == 0
    page = (tmp_path / "a" / "report.html").read_text()
    assert "Closeness to full prefill" in page


def test_one_flag_makes_all_that_choose_tokens_spend_alike(blocktune, refused, model, tmp_path):
    task = {"name": "worlds", "source": WORLDS, "max_new_tokens": 2}
    methods = ["full-prefill", "naive", "epic", {"name": "random", "budget": 0.9}]
    record = {"model": model, "methods": methods, "tasks": [task], "ttft": {"num": 0}}
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(record))
    run = ("eval", "--suite", tmp_path / "s.yaml", "--output", tmp_path / "out")
    done = blocktune(*run, "--layer-budget", 0.4)
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "out" / "results.json").read_text())["methods"]
    spent = [found[name]["recompute_ratio"] for name in found]
    assert spent[:2] == [1, 0]
    assert spent[2:] == [pytest.approx(0.4, abs=0.05)] * 2
    assert "exclude each other" in refused(*run, "--layer-budget", 0.4, "--budget", 0.4)


def test_a_label_that_states_a_budget_states_the_one_for_all(model):
    methods = [
        "naive",
        "epic",
        {"name": "kvlink + epic 15 %", "adapter": "out-{seed}", "seeds": [0, 1]},
    ]
    task = {"name": "worlds", "source": WORLDS}
    suite = parse_suite({"model": str(model), "methods": methods, "tasks": [task]})
    changed = at_one_budget(suite, 0.3, None)
    pooled = [f"kvlink + epic 15 %-{seed} at 30 %" for seed in (0, 1)]
    assert [spec.label for spec in changed.methods] == ["naive", "epic", *pooled]
    assert changed.pool == {"kvlink + epic 15 % at 30 %": pooled}
    changed = at_one_budget(suite, None, 0.3)
    assert changed.methods[2].label == "kvlink + epic 15 %-0 at 30 % of the layer-tokens"
    plain = parse_suite({"model": str(model), "methods": ["naive"], "tasks": [task]})
    with pytest.raises(ValueError, match="no method of the suite takes a budget"):
        at_one_budget(plain, 0.3, None)


def test_what_is_not_there_is_said_in_one_line(refused, tmp_path):
    assert "no results.json" in refused("eval", "report", tmp_path)
    assert "needs --suite FILE and --output FOLDER" in refused("eval")
    line = refused("eval", "--layer-budget", 0.5, "report", tmp_path)
    assert "--layer-budget has no effect on `blocktune eval report`" in line


def test_each_process_of_a_launcher_says_why_it_failed(blocktune, monkeypatch):
    """It may be the only one, and the launcher stops the others before they can speak."""
    monkeypatch.setenv("RANK", "1")
    assert blocktune("eval").stderr.startswith("rank 1: error: `blocktune eval` needs --suite")


def test_the_arena_is_asked_before_a_model_loads(refused, tmp_path):
    line = refused("eval", "arena", "--questions", tmp_path, "-m", "nobody/no", "-o", tmp_path)
    assert "--questions is a clone of" in line
