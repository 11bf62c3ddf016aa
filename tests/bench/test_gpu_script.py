"""The GPU bench, run small on a CPU, so that it works on the day a GPU is there.

The tests that it starts run by themselves.
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


def test_tiny_runs_everything_on_a_cpu(tmp_path):
    output, asked = tmp_path / "new" / "tiny.json", tmp_path / "asked"
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\n[ "$2" = pytest ] && echo "$@" >{asked} || exec {sys.executable} "$@"'
    )
    python.chmod(0o755)
    command = ["bash", SCRIPT, "--tiny", "--output", output]
    env = os.environ | {"PYTHON": str(python)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    assert asked.read_text() == "-m pytest -q tests/gpu --gpu-tests-on cpu\n"
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
