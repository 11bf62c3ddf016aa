"""One process, two processes and ZeRO-2 train the same: launched as a user launches them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from training.runs import make_trainer, write_run

from blocktune.adapter import AdapterInfo

ROOT = Path(__file__).resolve().parents[2]
STEPS = 20
GLOBAL_BATCH = 4
TIMEOUT_S = 1800  # DeepSpeed compiles an operator the first time

pytestmark = pytest.mark.alone

LAUNCHES = {"single": (1, "NO"), "ddp": (2, "MULTI_CPU"), "zero2": (2, "DEEPSPEED")}


def launch(name: str, folder: Path) -> tuple[list[float], AdapterInfo]:
    """Runs the recipe under an accelerate config; its losses and the adapter's metadata."""
    world_size, _ = LAUNCHES[name]
    path = write_run(
        folder,
        max_steps=STEPS,
        per_device_train_batch_size=GLOBAL_BATCH // world_size,
        num_links=2,
        block_share=0.5,
        learning_rate=2e-3,
        seed=5,
    )
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / f"recipes/accelerate/{name}.yaml"), "--main_process_port", "0"]
    command += [str(ROOT / "recipes/train.py"), "--config", str(path)]
    path_variable = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path_variable}
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    state = json.loads((folder / "out/trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    return losses, AdapterInfo.load(folder / "out")


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    return launch("single", tmp_path_factory.mktemp("single"))


def test_one_process_is_one_process(single):
    losses, info = single
    assert (info.training["world_size"], info.training["launch"]) == LAUNCHES["single"]
    assert len(losses) == STEPS
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("WORLD_SIZE", "2", "started 2 processes and each of them trains alone"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "asked for DeepSpeed and the Trainer runs without"),
    ],
)
def test_no_launch_is_lost_in_silence(tmp_path, monkeypatch, variable, value, line):
    trainer = make_trainer(tmp_path)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=line):
        trainer._refuse_lost_launch()


@pytest.mark.parametrize("name", ["ddp", "zero2"])
def test_two_processes_match_one(name, single, tmp_path):
    losses, info = launch(name, tmp_path)
    assert (info.training["world_size"], info.training["launch"]) == LAUNCHES[name]
    assert losses == pytest.approx(single[0], abs=1e-3)
