"""The experiment of 2,000 samples, run small: what it writes, and that it resumes."""

import importlib
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from blocktune.commands import app

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


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the script in this process, and so the commands that it starts: (code, out, err)."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.chdir(ROOT)
    lora_2000 = importlib.import_module("lora_2000")
    started = subprocess.run

    def command(words, **options):
        if "blocktune.cli" not in words:
            return started(words, **options)
        app(words[words.index("blocktune.cli") + 1 :], standalone_mode=False)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(subprocess, "run", command)

    def run(folder, *arguments):
        recipes = [str(folder / f"{name}.yaml") for name in ("joined", "control")]
        sizes = ["--questions", "4", "--alone", "2", "--dev-questions", "2", "--seeds", "0", "1"]
        places = ["--output", str(folder / "out"), "--results", str(folder / "results")]
        sizes += ["--worlds", "crowded=1"]
        words = ["lora_2000.py", "--recipes", *recipes, *sizes, *places, *arguments]
        monkeypatch.setattr(sys, "argv", words)
        return lora_2000.main(), *capsys.readouterr()

    return run


@pytest.mark.alone
def test_it_trains_asks_judges_and_resumes_where_it_was(run, tmp_path):
    for name, share in (("joined", 1.0), ("control", 0.0)):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(share=share))
    code, _, error = run(tmp_path)
    assert code == 0, error
    found = json.loads((tmp_path / "results" / "lora-2000.json").read_text())
    for name in ("best", "full_prefill", "cacheblend"):
        low, high = found[name]["ci95"]
        assert low <= found[name]["adjusted_f1"] <= high
        assert 0 < found[name]["n"] <= found[name]["asked"] == 4
    assert [(one["recipe"], one["seed"]) for one in found["runs"]] == [
        ("joined", 0), ("joined", 1), ("control", 0), ("control", 1),
    ]  # fmt: skip
    assert found["best"]["method"] == "block-attention"
    assert found["control"]["method"] == "full-prefill"
    assert found["best"]["full_attention"]["n"] == 6
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
    code, out, error = run(tmp_path)
    assert code == 0, error
    assert "4 of 4 adapters are trained" in out
    assert (weights.stat().st_mtime_ns, rows.read_text()) == (before, answered)

    (tmp_path / "joined.yaml").write_text(RECIPE.format(share=1.0).replace("2.0e-3", "1.0e-3"))
    code, _, error = run(tmp_path)
    assert code == 2
    assert "learning_rate 0.002 -> 0.001" in error


def test_other_worlds_need_a_folder_of_their_own(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lora_2000.py", "--worlds", "crowded=1"])
    with pytest.raises(SystemExit, match="2"):
        sys.modules["lora_2000"].main()
    assert "give them an --output of their own" in capsys.readouterr().err
