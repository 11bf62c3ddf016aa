"""The examples train alike, and what they made is served."""

import json
import runpy
from pathlib import Path

import pytest

from blocktune import Engine, load_examples
from blocktune.training.run import train

ROOT = Path(__file__).resolve().parents[2]
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


def losses(folder: Path) -> list[float]:
    state = json.loads(next(folder.glob("checkpoint-*/trainer_state.json")).read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


@pytest.fixture(scope="module")
def by_command(tmp_path_factory):
    folder = tmp_path_factory.mktemp("train")
    train([*(f"--{name}={value}" for name, value in SETTINGS.items()), f"--output_dir={folder}"])
    return losses(folder)


@pytest.mark.parametrize(("name", "lines"), [("trl_sft", 40), ("block_sft", 20)])
def test_an_example_trains_as_the_command_and_is_served(
    name, lines, by_command, tmp_path, monkeypatch
):
    script = ROOT / f"examples/{name}.py"
    assert len(script.read_text().splitlines()) < lines
    monkeypatch.chdir(ROOT)  # the adapter names its base, data/tiny
    monkeypatch.setattr("sys.argv", [str(script), str(tmp_path / "out")])
    runpy.run_path(str(script), run_name="__main__")
    found = losses(tmp_path / "out")
    assert len(found) == 10
    assert found == pytest.approx(by_command, abs=1e-5)
    asked = load_examples("worlds:test?seed=1&n=2")
    folders = [tmp_path / "out", tmp_path / "out/checkpoint-10"]
    engines = [Engine.from_pretrained(str(folder), device="cpu") for folder in folders]
    logits = [engine.next_logits(asked, "block-attention") for engine in engines]
    assert (logits[0] == logits[1]).all()
    base = Engine.from_pretrained("data/tiny", device="cpu").next_logits(asked, "naive")
    assert (logits[0] - base).abs().max() > 1e-2
