"""The examples, run as a user runs them: they train alike, and what they made is served."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blocktune import Engine, load_examples

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
SETTINGS = {
    "model_name_or_path": "data/tiny",
    "train_data": "worlds:train?seed=1&n=160&turns=8",
    "max_steps": 10,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "train_sampling_strategy": "sequential",
    "gradient_checkpointing": "false",
    "logging_steps": 1,
    "report_to": "none",
    "use_peft": "true",
    "lora_r": 64,
    "lora_alpha": 128,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "seed": 42,
}
COMMAND = ["-m", "blocktune.cli", "train", *(f"--{k}={v}" for k, v in SETTINGS.items())]

pytestmark = pytest.mark.alone


def run(*words) -> None:
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(
        command, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


def losses(folder: Path) -> list[float]:
    state = json.loads(next(folder.glob("checkpoint-*/trainer_state.json")).read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def by_command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    run(*COMMAND, f"--output_dir={folder}")
    return losses(folder)


@pytest.mark.parametrize(("name", "lines"), [("trl_sft", 40), ("block_sft", 20)])
def test_an_example_trains_as_the_command_and_is_served(
    name, lines, by_command, tmp_path, monkeypatch
):
    script = ROOT / f"examples/{name}.py"
    assert len(script.read_text().splitlines()) < lines
    run(script, tmp_path / "out")
    found = losses(tmp_path / "out")
    assert len(found) == 10
    assert found == pytest.approx(by_command, abs=1e-5)
    monkeypatch.chdir(ROOT)  # the adapter names its base, data/tiny
    asked = load_examples("worlds:test?seed=1&n=2")
    folders = [tmp_path / "out", tmp_path / "out/checkpoint-10"]
    engines = [Engine.from_pretrained(str(folder), device="cpu") for folder in folders]
    logits = [engine.next_logits(asked, "block-attention") for engine in engines]
    assert (logits[0] == logits[1]).all()
    base = Engine.from_pretrained("data/tiny", device="cpu").next_logits(asked, "naive")
    assert (logits[0] - base).abs().max() > 1e-2
