"""A run that was killed resumes as if nothing had happened."""

import json
import time
from pathlib import Path

import forked
import pytest
import torch
from training.runs import write_run

from blocktune.training.run import train

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 900
STEPS, SAVE = 24, 10

# Everything that draws: dropout, the order of data, modes, fresh rows, groups, gaps. Eight steps an
# epoch, so that the checkpoint lies in the middle of the second.
OPTIONS = {
    "train_limit": 8,
    "train_sampling_strategy": "group_by_length",
    "both_modes": True,
    "num_links": 1,
    "lora_dropout": 0.1,
    "recompute": "random",
    "recompute_min": 0.0,
    "recompute_max": 0.5,
    "block_dropout": 0.3,
    "position_jitter": 4,
    "distill_weight": 0.5,
    "max_steps": STEPS,
    "save_strategy": "steps",
    "save_steps": SAVE,
    "seed": 11,
}


@pytest.fixture
def one_thread():
    """Runs of this process compute as those of another, which has one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def history(folder: Path) -> list[tuple[int, float]]:
    log = json.loads((folder / "out/trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"]) for entry in log if "loss" in entry]


def test_a_killed_run_resumes_to_the_same_trajectory(tmp_path, one_thread):
    path = write_run(tmp_path / "killed", **OPTIONS)
    out = tmp_path / "killed/out"
    killed = forked.Program([ROOT / "recipes/train.py", "--config", path])
    deadline = time.monotonic() + TIMEOUT_S
    while not (out / f"checkpoint-{SAVE}").exists():
        assert killed.poll() is None, killed.err.read_text()[-2000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    killed.kill()
    killed.wait()
    assert not (out / "blocktune.json").exists()  # it had not finished

    train(["--config", str(path), "--resume_from_checkpoint", "true"])
    train(["--config", str(write_run(tmp_path / "whole", **OPTIONS))])
    expected = history(tmp_path / "whole")
    assert [step for step, _ in expected] == list(range(1, STEPS + 1))
    assert history(tmp_path / "killed") == expected
    assert len({loss for _, loss in expected}) == STEPS
