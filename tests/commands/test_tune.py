"""`blocktune tune` on a model on disk."""

import json

import pytest
import yaml

from blocktune.data import load_examples, write_jsonl

SOURCE = "worlds:dev?seed=1&n=4&passages=2&kinds=self-contained"


@pytest.fixture
def tuning(model, tmp_path):
    """A run whose questions lie in a file, and the arguments that start it."""
    write_jsonl(tmp_path / "held-out.jsonl", load_examples(SOURCE))
    task = {"name": "mine", "source": str(tmp_path / "held-out.jsonl"), "max_new_tokens": 2}
    record = {"model": model, "method": "epic", "grid": {"k": [1, 2]}, "task": task}
    record["batch_size"] = 2
    (tmp_path / "tune.yaml").write_text(yaml.safe_dump(record))
    return ("tune", "--config", tmp_path / "tune.yaml", "--output")


def test_the_points_are_printed_and_kept(blocktune, tuning, tmp_path):
    done = blocktune(*tuning, tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert "best: k=" in done.stdout
    found = json.loads((tmp_path / "out" / "tuned.json").read_text())
    assert [point["n"] for point in found["points"]] == [4, 4]


def test_a_test_split_is_refused(refused, tuning, tmp_path):
    path = tmp_path / "tune.yaml"
    path.write_text(path.read_text().replace("held-out", "test"))
    assert "is a test split" in refused(*tuning, tmp_path / "out")
    assert not (tmp_path / "out").exists()
