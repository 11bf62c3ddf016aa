"""Suites are strict: what is misspelt is said in one line, and nothing runs."""

from pathlib import Path

import pytest
import yaml

from blocktune.evaluation.suite import MethodSpec, TaskSpec, load_suite, parse_suite

MINIMAL = {
    "model": "data/tiny",
    "methods": ["naive"],
    "tasks": [{"name": "worlds", "source": "worlds:test?n=4"}],
}


def test_names_and_mappings_are_both_methods():
    tuned = {"name": "naive", "adapter": "out/a", "label": "tuned", "params": {"keep_bos": False}}
    suite = parse_suite(MINIMAL | {"methods": ["naive", tuned], "ttft": {"num": 3}})
    assert suite.methods == (
        MethodSpec("naive", label="naive"),
        MethodSpec("naive", "out/a", "tuned", {"keep_bos": False}),
    )
    assert suite.tasks == (TaskSpec("worlds", "worlds:test?n=4"),)
    assert suite.ttft.num == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methds": []}, "s.yaml: unknown key 'methds'; known: model, methods, tasks, dtype, "),
        ({"methods": [{"nam": "x"}]}, "methods[0]: unknown key 'nam'; known: name, adapter"),
        ({"methods": [{"adapter": "x"}]}, "methods[0]: 'name' is missing"),
        ({"methods": []}, "methods: must be a list with at least one entry, got []"),
        ({"methods": [3]}, "methods[0]: must be a mapping"),
        ({"methods": ["naive", "naive"]}, "method label 'naive' is given 2 times; give a 'label'"),
        ({"methods": ["naive", {"name": "epic", "label": "Naive"}]}, "'naive' is given 2 times"),
        ({"methods": [{"name": "a", "label": "a/b"}]}, "label must name a file"),
        ({"methods": ["a", {"name": "a", "label": "a.part1"}]}, "label must name a file"),
        ({"tasks": [{"name": "w"}]}, "tasks[0]: 'source' is missing"),
        (
            {"tasks": [{"name": "w", "source": "x", "limit": 0}]},
            "limit must be a whole number, at least 1",
        ),
        ({"tasks": [{"name": "w", "source": "x", "limit": True}]}, "'limit' must be a whole"),
        ({"ttft": {"num": -1}}, "ttft: num must be a whole number, at least 0"),
        ({"ttft": {"chunks": 0}}, "ttft: chunks must be a whole number, at least 1, got 0"),
        ({"ttft": 20}, "ttft: must be a mapping of keys to values, got 20"),
        ({"batch_size": "8"}, "'batch_size' must be a whole number, got '8'"),
        ({"seed": 1.5}, "'seed' must be a whole number, got 1.5"),
        ({"seed": -1}, "seed must be a whole number, at least 0, got -1"),
        ({"model": None}, "'model' must be text, got None"),
    ],
)
def test_mistakes_are_one_clear_line(change, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the message is compared whole below
        parse_suite(MINIMAL | change, "s.yaml")
    assert message in str(caught.value)
    assert str(caught.value).startswith("s.yaml: ")
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_broken_yaml_name_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no suite at .*missing\.yaml"):
        load_suite(tmp_path / "missing.yaml")
    (tmp_path / "broken.yaml").write_text("model: [")
    with pytest.raises(ValueError, match=r"broken\.yaml: not YAML"):
        load_suite(tmp_path / "broken.yaml")


@pytest.mark.parametrize("path", sorted(Path("eval/suites").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_suites_load(path):
    assert load_suite(path).methods
    assert f"eval --suite {path.as_posix()} " in path.read_text() or path.stem == "demo"


def test_a_suite_survives_yaml(tmp_path):
    (tmp_path / "s.yaml").write_text(yaml.safe_dump(MINIMAL))
    assert load_suite(tmp_path / "s.yaml") == parse_suite(MINIMAL)
