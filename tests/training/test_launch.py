"""One process and two, however they share the work, train the same: launched as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import forked
import pytest
import torch
from accelerate.commands import launch as accelerate
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)
from hub.stand_in import TOKEN, running_hub
from hub.support import put_base
from safetensors.torch import load_file
from training.launching.several_runs import FILE, probe
from training.runs import make_trainer, write_run

from blocktune.adapter import AdapterInfo
from blocktune.adapter.load import load_model
from blocktune.training.launch_checks import refuse_launch

ROOT = Path(__file__).resolve().parents[2]
LAUNCHING = Path(__file__).parent / "launching"
STEPS = 20
GLOBAL_BATCH = 4

pytestmark = pytest.mark.alone

LAUNCHES = {
    "single": (1, "NO"),
    "ddp": (2, "MULTI_CPU"),
    "zero2": (2, "DEEPSPEED stage 2"),
    "zero3": (2, "DEEPSPEED stage 3"),
    "fsdp2": (2, "FSDP version 2"),
}
PREPARED = {
    "single": prepare_simple_launcher_cmd_env,
    "zero2": prepare_deepspeed_cmd_env,
    "fsdp2": prepare_multi_gpu_env,
}
"""What accelerate gives to processes of these configurations; it starts those of the others."""
OBJECTIVE = {
    "distill_weight": 0.5,
    "distill_top_k": 8,
    "distill_states": "kv",
    "recompute": "deviation",
    "recompute_min": 0.0,
    "recompute_max": 0.5,
}
"""Teacher and fresh rows: a second forward, and one that may stop halfway."""


def launch(name: str, *configs: Path, **variables: str) -> None:
    """Runs under one of the recipes' accelerate configs: started by accelerate, or as it would."""
    given = ["--config_file", str(ROOT / f"recipes/accelerate/{name}.yaml")]
    given += ["--main_process_port", "0"]
    program = ("fsdp_on_cpu.py", "--config") if name == "fsdp2" else ("several_runs.py",)
    words = [str(LAUNCHING / program[0]), *program[1:], *map(str, configs)]
    if name in PREPARED:
        seen = []
        with pytest.MonkeyPatch.context() as patch:
            for launcher in ("simple_launcher", "deepspeed_launcher", "multi_gpu_launcher"):
                patch.setattr(accelerate, launcher, seen.append)
            accelerate.launch_command(
                accelerate.launch_command_parser().parse_args([*given, *words])
            )
        made = PREPARED[name](*seen)
        env = made if name == "fsdp2" else made[1]
        done = forked.run_ranks(LAUNCHES[name][0], words, env | variables)
    else:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # ninja
        env = os.environ | {"OMP_NUM_THREADS": "1", "PATH": path, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "accelerate.commands.launch", *given, *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env | variables)
    assert done.returncode == 0, done.stderr[-3000:]


def config(name: str, folder: Path, **more) -> Path:
    """A run's configuration, with ``more`` options.

    The last of 16 steps an epoch has one row, so that one of two ranks has none to learn from.
    """
    options = {
        "max_steps": STEPS,
        "train_limit": 61,
        "train_sampling_strategy": "group_by_length",
        "per_device_train_batch_size": GLOBAL_BATCH // LAUNCHES[name][0],
        "num_links": 2,
        "block_share": 0.5,
        "learning_rate": 2e-3,
        "seed": 5,
    }
    if name == "ddp" and not torch.cuda.is_available():
        options["use_cpu"] = None  # chosen where there is no GPU
    return write_run(folder, **options | more)


def losses(folder: Path) -> list[float]:
    state = json.loads((folder / "out/trainer_state.json").read_text())
    return [entry["loss"] for entry in state["log_history"] if "loss" in entry]


def logits_of(folder: Path, **options) -> torch.Tensor:
    """The saved adapter's, on a base loaded here."""
    model = load_model(str(folder / "base"), folder / "out", **options).model
    with torch.no_grad():
        return model(probe(model.config.vocab_size, 2), use_cache=False).logits


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """Folders of a plain run and of one with every objective, by one process."""
    folder = tmp_path_factory.mktemp("single")
    plain, taught = folder / "plain", folder / "taught"
    launch("single", config("single", plain), config("single", taught, **OBJECTIVE))
    return plain, taught


def require_same_run(name: str, folder: Path, other: Path) -> None:
    info = AdapterInfo.load(folder / "out")
    assert (info.training["world_size"], info.training["launch"]) == LAUNCHES[name]
    assert losses(folder) == pytest.approx(losses(other), abs=1e-3)
    assert info.base_fingerprint == AdapterInfo.load(other / "out").base_fingerprint
    # What was saved is what was trained: 20 steps of float32 rounding apart, not a lost shard.
    torch.testing.assert_close(logits_of(folder), logits_of(other), rtol=0, atol=5e-2)


def test_one_process_is_one_process(single):
    for folder in single:
        info = AdapterInfo.load(folder / "out")
        assert (info.training["world_size"], info.training["launch"]) == LAUNCHES["single"]
        assert len(losses(folder)) == STEPS
        assert losses(folder)[-1] < 0.7 * losses(folder)[0]


@pytest.mark.parametrize(
    ("variable", "value", "line"),
    [
        ("WORLD_SIZE", "2", "started 2 processes, but each would train alone"),
        ("ACCELERATE_USE_DEEPSPEED", "true", "asked for DeepSpeed, but the Trainer runs without"),
        ("ACCELERATE_USE_FSDP", "true", "asked for FSDP, which accelerate supports only on GPUs"),
    ],
)
def test_no_launch_is_lost_in_silence(tmp_path, monkeypatch, variable, value, line):
    trainer = make_trainer(tmp_path)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=line):
        refuse_launch(trainer.accelerator, False)


def test_ddp_matches_one_process_and_resumes_as_if_never_stopped(single, tmp_path):
    """Stopped in the middle of the second epoch, with dropout: ranks draw apart, their data not."""
    options = {"train_limit": 13, "lora_dropout": 0.1, "max_steps": 8}
    options |= {"save_strategy": "steps", "save_steps": 6}
    plain, taught, whole, resumed = (tmp_path / n for n in ("plain", "taught", "whole", "resumed"))
    runs = [config("ddp", plain), config("ddp", taught, **OBJECTIVE)]
    runs.append(config("ddp", whole, **options))
    options |= {"model_name_or_path": f"{whole}/base", "train_data": f"{whole}/train.jsonl"}
    options |= {"resume_from_checkpoint": f"{whole}/out/checkpoint-6"}
    launch("ddp", *runs, config("ddp", resumed, **options))
    for folder, other in zip((plain, taught), single, strict=True):
        require_same_run("ddp", folder, other)
    assert len(set(losses(whole))) == 8
    assert losses(resumed) == losses(whole)


def test_zero2_matches_one_process_and_qlora_with_links_reloads_elsewhere(single, tmp_path):
    taught, quantised = tmp_path / "taught", tmp_path / "quantised"
    options = {"load_in_4bit": True, "dtype": "float32", "num_links": 2}
    launch("zero2", config("zero2", taught, **OBJECTIVE), write_run(quantised, **options))
    require_same_run("zero2", taught, single[1])
    info = AdapterInfo.load(quantised / "out")
    assert (info.training["world_size"], info.training["launch"]) == LAUNCHES["zero2"]
    assert info.quantization == "nf4"
    for folder, more in ((taught, {}), (quantised, {"quantize": "nf4"})):
        trained = load_file(folder / FILE)["logits"]
        torch.testing.assert_close(logits_of(folder, **more), trained, rtol=0, atol=1e-5)


def test_zero3_matches_one_process_and_one_of_its_processes_pushes(single, tmp_path):
    """That one loads the base, checks and sends, while the other has nothing left to do."""
    push = {"push_to_hub": True, "hub_model_id": "me/mine", "hub_token": TOKEN}
    path = config("zero3", tmp_path, **OBJECTIVE, **push, model_name_or_path="org/base")
    with running_hub() as hub:
        put_base(hub, tmp_path)
        home = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "home")}
        launch("zero3", path, **home, HF_HUB_DISABLE_XET="1")
        assert hub.files("me/mine")["links.safetensors"]
    require_same_run("zero3", tmp_path, single[1])


def test_fsdp2_matches_one_process(single, tmp_path):
    launch("fsdp2", config("fsdp2", tmp_path, **OBJECTIVE))
    require_same_run("fsdp2", tmp_path, single[1])
