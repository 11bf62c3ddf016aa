"""The shapes of the 8B models run every method of the shipped suites, cut in depth and width."""

import importlib.util
import json
from pathlib import Path

import pytest
import yaml

from blocktune.evaluation.suite import load_suite

SHIPPED = ("rag", "open-ends", "quick", "demo")
spec = importlib.util.spec_from_file_location("dry_run", Path("eval/dry_run.py"))
dry_run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(dry_run)


@pytest.mark.parametrize("name", dry_run.CONFIGS)
def test_a_shape_runs_the_methods_of_the_shipped_suites(name, tmp_path, monkeypatch):
    # Each picture is drawn once: test_report_page.py draws them as SVG too.
    monkeypatch.setattr("blocktune.evaluation.report.to_svg", lambda *chart: b"<svg/>")
    monkeypatch.setenv("BLOCKTUNE_PLUGINS", "")  # set by the dry run, for its own process
    shipped = load_suite("eval/suites/rag.yaml").methods
    methods = [m.entry() | {"label": m.label} for m in shipped if m.name != "no-context"]
    worlds = {
        "name": "worlds",
        "source": "worlds:test?n=2&passages=2&kinds=self-contained",
        "max_new_tokens": 2,
    }
    tasks = [worlds, {"task": "eval/tasks/musique.yaml"}]
    suite = tmp_path / "suite.yaml"
    record = {"model": "any", "methods": methods, "tasks": tasks, "ttft": {"num": 1}}
    suite.write_text(yaml.safe_dump(record))
    output = tmp_path / "out"
    given = ["--model", name, "--suite", str(suite), "--output", str(output), "--shrink", "32"]
    dry_run.main([*given, "--layers", "2", "--limit", "2"])
    results = json.loads((output / "results.json").read_text())
    assert set(results["methods"]) == {method["label"] for method in methods}
    assert set(results["tasks"]) == {"worlds"}  # what would be downloaded is left out
    assert (output / "report.html").is_file()


def test_the_cut_keeps_what_makes_the_model():
    llama = dry_run.cut_config("llama-3.1-8b", 100, 2, 16)
    assert (llama.num_hidden_layers, llama.hidden_size, llama.num_key_value_heads) == (2, 256, 8)
    assert llama.rope_parameters["rope_type"] == "llama3"
    assert dry_run.cut_config("qwen3-8b", 100, 1, 1).head_dim == 128
    assert dry_run.cut_config("mistral-7b-v0.3", 100, 1, 1).sliding_window is None


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_suites_name_methods_that_there_are(name):
    from blocktune.methods import build_entry

    for method in load_suite(f"eval/suites/{name}.yaml").methods:
        assert build_entry(method.entry())
