"""The GPU bench, run small on a CPU, so that it works on the day a GPU is there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "eval" / "bench" / "gpu.sh"


def run(*arguments) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHON": sys.executable, "PYTEST_ADDOPTS": "-p no:cacheprovider"}
    command = ["bash", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env)


@pytest.mark.alone
def test_tiny_runs_everything_on_a_cpu(tmp_path):
    output = tmp_path / "new" / "tiny.json"
    done = run("--tiny", "--output", output)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(output.read_text())
    assert report["attention"]["split_max_abs_diff"] < 1e-5
    assert 0 < report["attention"]["visible_bound_s"] < report["attention"]["full_bound_s"]
    assert report["training"]["weights_bound_s"] > 0
    assert report["machine"]["copy_bytes_per_s"] > 0
    assert report["training"]["losses"][-1] < report["training"]["losses"][0]
    assert report["cached_answer"]["naive"]["recompute_ratio"] == 0
    assert " skipped" not in done.stdout


def test_a_wrong_size_is_one_clear_line(tmp_path):
    command = [sys.executable, str(SCRIPT.with_name("gpu.py")), "--tiny", "--tokens", "100"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--tokens must be a multiple of 64, got 100")
