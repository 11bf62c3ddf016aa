"""The experiment of 2,000 samples, run small: what it writes, and that it goes on where it was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "eval" / "training" / "lora_2000.py"
RECIPE = """
model_name_or_path: data/tiny
train_data: worlds:train?seed=1&n=8
output_dir: elsewhere
block_share: {share}
use_peft: true
lora_r: 4
lora_target_modules: all-linear
learning_rate: 2.0e-3
per_device_train_batch_size: 4
max_steps: 2
logging_steps: 1
save_strategy: "no"
use_cpu: true
report_to: none
"""


def run(folder, *arguments) -> subprocess.CompletedProcess:
    recipes = [str(folder / f"{name}.yaml") for name in ("joined", "control")]
    sizes = ["--questions", "8", "--alone", "4", "--dev-questions", "4", "--seeds", "0", "1"]
    places = ["--output", str(folder / "out"), "--results", str(folder / "results")]
    sizes += ["--worlds", "crowded=1"]
    command = [sys.executable, str(SCRIPT), "--recipes", *recipes, *sizes, *places, *arguments]
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT, env=env)


@pytest.mark.alone
def test_it_trains_asks_judges_and_goes_on_where_it_was(tmp_path):
    for name, share in (("joined", 1.0), ("control", 0.0)):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(share=share))
    done = run(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results" / "lora-2000.json").read_text())
    for name in ("best", "full_prefill", "cacheblend"):
        low, high = found[name]["ci95"]
        assert low <= found[name]["adjusted_f1"] <= high
        assert 0 < found[name]["n"] <= found[name]["asked"] == 8
    assert [(one["recipe"], one["seed"]) for one in found["runs"]] == [
        ("joined", 0), ("joined", 1), ("control", 0), ("control", 1),
    ]  # fmt: skip
    assert found["best"]["method"] == "block-attention"
    assert found["control"]["method"] == "full-prefill"
    assert found["best"]["full_attention"]["n"] == 12
    cost = found["runs"][0]["cost"]
    assert cost["steps"] == 2
    assert cost["trainable_parameters"] > 0
    assert cost["tokens"] > 8 * 100
    page = (tmp_path / "results" / "lora-2000.md").read_text()
    assert "**joined**" in page
    assert "control, by full prefill" in page
    trained_on = {one["data"] for one in found["provenance"]["adapters"].values()}
    assert trained_on == {"worlds:train?seed=1&n=8&crowded=1"}
    assert all(source.endswith("&crowded=1") for source in found["asked_on"])

    weights = tmp_path / "out" / "joined-0" / "adapter_model.safetensors"
    rows = tmp_path / "out" / "lora-2000-test" / "rows" / "naive.jsonl"
    before, answered = weights.stat().st_mtime_ns, rows.read_text()
    again = run(tmp_path)
    assert again.returncode == 0, again.stderr
    assert "4 of 4 adapters are trained" in again.stdout
    assert (weights.stat().st_mtime_ns, rows.read_text()) == (before, answered)

    (tmp_path / "joined.yaml").write_text(RECIPE.format(share=1.0).replace("2.0e-3", "1.0e-3"))
    changed = run(tmp_path)
    assert changed.returncode == 2
    assert "learning_rate 0.002 -> 0.001" in changed.stderr


def test_other_worlds_need_a_folder_of_their_own():
    command = [sys.executable, str(SCRIPT), "--worlds", "crowded=1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2
    assert "give them an --output of their own" in done.stderr
