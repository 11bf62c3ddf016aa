"""The GPU bench, run small on a CPU, so that it works on the day a GPU is there.

The tests that it starts are only collected: they run by themselves.
"""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "eval" / "bench" / "gpu.sh"


@pytest.mark.alone
def test_tiny_runs_everything_on_a_cpu(tmp_path):
    output = tmp_path / "new" / "tiny.json"
    env = os.environ | {"PYTHON": sys.executable}
    env |= {"PYTEST_ADDOPTS": "-p no:cacheprovider --collect-only"}
    command = ["bash", SCRIPT, "--tiny", "--output", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tests/gpu/test_attention.py::" in done.stdout
    report = json.loads(output.read_text())
    assert report["attention"]["split_max_abs_diff"] < 1e-5
    assert 0 < report["attention"]["visible_bound_s"] < report["attention"]["full_bound_s"]
    assert report["training"]["weights_bound_s"] > 0
    assert report["machine"]["copy_bytes_per_s"] > 0
    assert report["training"]["losses"][-1] < report["training"]["losses"][0]
    assert report["cached_answer"]["naive"]["recompute_ratio"] == 0


def test_a_wrong_size_is_one_clear_line(monkeypatch, capsys):
    script = str(SCRIPT.with_name("gpu.py"))
    monkeypatch.setattr(sys, "argv", [script, "--tiny", "--tokens", "100"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(script, run_name="__main__")
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith("--tokens must be a multiple of 64, got 100")
