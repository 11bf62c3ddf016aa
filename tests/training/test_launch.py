"""One process and two, however they share the work, train the same: launched as a user does."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub.stand_in import TOKEN, running_hub
from safetensors.torch import load_file
from training.launching.trained_logits import FILE, probe
from training.runs import make_trainer, write_run

from blocktune.adapter import AdapterInfo
from blocktune.adapter.load import load_model
from blocktune.training.launch_checks import refuse_lost_launch

ROOT = Path(__file__).resolve().parents[2]
RECIPE = ROOT / "recipes/train.py"
LAUNCHING = Path(__file__).parent / "launching"
STEPS = 20
GLOBAL_BATCH = 4
TIMEOUT_S = 1800  # DeepSpeed compiles an operator the first time

pytestmark = pytest.mark.alone

LAUNCHES = {
    "single": (1, "NO"),
    "ddp": (2, "MULTI_CPU"),
    "zero2": (2, "DEEPSPEED stage 2"),
    "zero3": (2, "DEEPSPEED stage 3"),
    "fsdp2": (2, "FSDP version 2"),
}
PROGRAMS = {"fsdp2": LAUNCHING / "fsdp_on_cpu.py"}


def run(name: str, program: Path, config: Path, **variables: str) -> subprocess.CompletedProcess:
    """A program under one of the recipes' accelerate configs, with ``variables`` set."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    command += [str(ROOT / f"recipes/accelerate/{name}.yaml"), "--main_process_port", "0"]
    command += [str(program), "--config", str(config)]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja
    env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)} | variables
    return subprocess.run(
        command, capture_output=True, text=True, timeout=TIMEOUT_S, env=env, check=False
    )


def launch(name: str, folder: Path, **more) -> tuple[list[float], AdapterInfo]:
    """Runs the recipe, with ``more`` options; its losses and the adapter's metadata.

    The last of 16 steps an epoch has one row, so that one of two ranks has none to learn from.
    """
    world_size, _ = LAUNCHES[name]
    options = {
        "max_steps": STEPS,
        "train_limit": 61,
        "train_sampling_strategy": "group_by_length",
        "per_device_train_batch_size": GLOBAL_BATCH // world_size,
        "num_links": 2,
        "block_share": 0.5,
        "learning_rate": 2e-3,
        "seed": 5,
    }
    if name == "ddp" and not torch.cuda.is_available():
        options["use_cpu"] = None  # chosen where there is no GPU
    done = run(name, PROGRAMS.get(name, RECIPE), write_run(folder, **options | more))
    assert done.returncode == 0, done.stderr[-3000:]
    return losses_of(folder), AdapterInfo.load(folder / "out")


def losses_of(folder: Path) -> list[float]:
    state = json.loads((folder / "out/trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def logits_of(folder: Path) -> torch.Tensor:
    """The saved adapter's, on a base loaded here."""
    model = load_model(str(folder / "base"), folder / "out").model
    with torch.no_grad():
        return model(probe(model.config.vocab_size, 2), use_cache=False).logits


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    return *launch("single", folder), logits_of(folder)


def test_one_process_is_one_process(single):
    losses, info, _ = single
    assert (info.training["world_size"], info.training["launch"]) == LAUNCHES["single"]
    assert len(losses) == STEPS
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("WORLD_SIZE", "2", "started 2 processes and each of them trains alone"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "asked for DeepSpeed and the Trainer runs without"),
        ("ACCELERATE_USE_FSDP", "true", "asked for FSDP, and accelerate has it for GPUs only"),
    ],
)
def test_no_launch_is_lost_in_silence(tmp_path, monkeypatch, variable, value, line):
    trainer = make_trainer(tmp_path)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=line):
        refuse_lost_launch(trainer.accelerator, 0, False)


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_processes_match_one(name, single, tmp_path):
    losses, info = launch(name, tmp_path)
    assert (info.training["world_size"], info.training["launch"]) == LAUNCHES[name]
    assert losses == pytest.approx(single[0], abs=1e-3)
    assert info.base_fingerprint == single[1].base_fingerprint
    # What was saved is what was trained: 20 steps of float32 rounding apart, not a lost shard.
    torch.testing.assert_close(logits_of(tmp_path), single[2], rtol=0, atol=5e-2)


def test_two_processes_resume_as_if_never_stopped(tmp_path):
    """From the middle of the second epoch, and with dropout: ranks draw apart, their data not."""
    options = {"train_limit": 13, "lora_dropout": 0.1, "max_steps": 8}
    options |= {"save_strategy": "steps", "save_steps": 6}
    expected, _ = launch("ddp", tmp_path, **options)
    shutil.rmtree(tmp_path / "out/checkpoint-8")
    (tmp_path / "out/trainer_state.json").unlink()
    resumed, _ = launch("ddp", tmp_path, **options, resume_from_checkpoint=True)
    assert len(set(expected)) == 8
    assert resumed == expected


def test_fsdp_on_cpus_is_refused(tmp_path):
    done = run("fsdp2", RECIPE, write_run(tmp_path))
    assert done.returncode != 0
    assert "error: the launcher asked for FSDP" in done.stderr


def test_a_run_under_zero3_is_pushed_by_one_of_its_processes(tmp_path):
    """That one loads the base, checks and sends, while the other has nothing left to do."""
    push = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_token": TOKEN}
    config = write_run(tmp_path, **push, num_links=2, max_steps=1, model_name_or_path="org/base")
    with running_hub() as hub:
        base = {path.name: path.read_bytes() for path in (tmp_path / "base").iterdir()}
        hub.put("org/base", base | {"README.md": b"---\nlicense: mit\n---\n"})
        home = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        done = run("zero3", RECIPE, config, **home, HF_HUB_DISABLE_XET="1")
        assert done.returncode == 0, done.stderr[-3000:]
        assert hub.files("me/mine")["links.safetensors"]
    assert AdapterInfo.load(tmp_path / "out").training["launch"] == LAUNCHES["zero3"][1]


def test_qlora_with_links_under_zero2_reloads_elsewhere(tmp_path):
    quantised = {"load_in_4bit": True, "dtype": "float32", "num_links": 2}
    done = run("zero2", LAUNCHING / "trained_logits.py", write_run(tmp_path, **quantised))
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out"
    info = AdapterInfo.load(out)
    assert (info.training["world_size"], info.training["launch"]) == LAUNCHES["zero2"]
    assert info.quantization == "nf4"
    loaded = load_model(str(tmp_path / "base"), out, quantize="nf4")
    with torch.no_grad():
        logits = loaded.model(probe(loaded.model.config.vocab_size, 2), use_cache=False).logits
    torch.testing.assert_close(logits, load_file(out / FILE)["logits"], rtol=0, atol=1e-5)
