"""The same command continues a stopped run, leaves a finished one, and never mixes two."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig
from training.runs import write_run
from training.toy import toy_examples

from blocktune import BlockSFTConfig, BlockSFTTrainer
from blocktune.adapter import AdapterInfo
from blocktune.adapter.load import load_model
from blocktune.data import write_jsonl
from blocktune.training import resume
from blocktune.training.checkpoint import StagedSaving
from blocktune.training.run import train

OPTIONS = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}


def run(path: Path, *more: str) -> Path | None:
    return train(["--config", str(path), *more])


def losses(folder: Path) -> list[float]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in log if "loss" in entry]


@pytest.fixture
def stop(monkeypatch):
    """Makes the next runs stop like Ctrl-C, after the checkpoint of a step; None lets them run."""
    save = StagedSaving._save_checkpoint

    def at(step):
        def save_and_stop(trainer, *rest):
            save(trainer, *rest)
            if trainer.state.global_step == step:
                raise KeyboardInterrupt

        monkeypatch.setattr(StagedSaving, "_save_checkpoint", save_and_stop)

    return at


@pytest.fixture
def stopped(tmp_path, stop):
    """The configuration of a run that was stopped at step 2 of 4."""
    path = write_run(tmp_path, **OPTIONS)
    stop(2)
    with pytest.raises(KeyboardInterrupt, match="checkpoint-2; repeat the command to continue"):
        run(path)
    stop(None)
    return path


def test_the_same_command_continues_and_then_does_nothing(stopped, tmp_path, capsys):
    out = tmp_path / "out"
    whole = write_run(tmp_path / "whole", **OPTIONS)
    run(whole)
    capsys.readouterr()
    run(stopped)
    assert f"continuing from {out}/checkpoint-2" in capsys.readouterr().out
    assert losses(out) == losses(tmp_path / "whole/out")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    for more in ((), ("--resume_from_checkpoint", "true")):
        run(stopped, *more)
        assert capsys.readouterr().out == "the run is finished; --overwrite starts again\n"
    run(stopped, "--dry-run")
    assert "training plan" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    (tmp_path / "train.jsonl").touch()
    run(stopped)
    assert "finished, before " + str(tmp_path / "train.jsonl") in capsys.readouterr().out


def test_provenance_says_what_each_start_did(stopped, tmp_path):
    assert AdapterInfo.load(tmp_path / "out/checkpoint-2").training["steps"] == 2
    run(stopped)
    training = AdapterInfo.load(tmp_path / "out").training
    assert (training["from_step"], training["steps"]) == (2, 4)
    (earlier,) = training["earlier"]
    assert (earlier["from_step"], earlier["until_step"], earlier["world_size"]) == (0, 2, 1)
    assert earlier["commit"] == training["commit"]
    saved = yaml.safe_load((tmp_path / "out/resolved_config.yaml").read_text())
    assert saved["training"]["learning_rate"] == 5e-3


@pytest.mark.parametrize("done", [False, True])
def test_other_settings_are_refused_by_name(stopped, tmp_path, done):
    if done:
        run(stopped)
    before = sorted(tmp_path.rglob("*"))
    other = ("--learning_rate", "1e-4", "--block_share", "0.5", "--lora_r", "8")
    words = r"block_share 1\.0 -> 0\.5.*learning_rate 0\.005 -> 0\.0001|lora_r 4 -> 8"
    with pytest.raises(ValueError, match=words) as refused:
        run(stopped, *other, "--resume_from_checkpoint", "true")
    for key in ("lora_r 4 -> 8", "learning_rate 0.005 -> 0.0001", "block_share 1.0 -> 0.5"):
        assert key in str(refused.value)
    with pytest.raises(ValueError, match="max_steps 4 -> 6"):  # the schedule would be another
        run(stopped, "--max_steps", "6")
    with pytest.raises(ValueError, match="rows in a step 2 -> 4"):
        run(stopped, "--per_device_train_batch_size", "4")
    assert sorted(tmp_path.rglob("*")) == before


def test_what_decides_nothing_may_change(stopped, tmp_path):
    run(
        *(stopped, "--logging_steps", "2", "--save_steps", "1", "--save_total_limit", "3"),
        *("--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "2"),
    )
    assert AdapterInfo.load(tmp_path / "out").training["steps"] == 4


def test_a_constant_rate_may_train_longer(tmp_path):
    path = write_run(tmp_path, **OPTIONS | {"lr_scheduler_type": "constant"})
    run(path)
    run(path, "--max_steps", "6")
    longer = losses(tmp_path / "out")
    run(path, "--max_steps", "6", "--overwrite")
    assert longer == losses(tmp_path / "out")
    assert len(longer) == 6


def test_other_data_under_the_same_name_is_refused(stopped, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", toy_examples(63))
    with pytest.raises(ValueError, match=r"the training examples changed since"):
        run(stopped)


def test_a_base_is_not_trained_into_its_own_folder(tmp_path):
    path = write_run(tmp_path, **OPTIONS, output_dir=str(tmp_path / "base"))
    before = sorted((tmp_path / "base").iterdir())
    for more in ((), ("--overwrite",)):
        with pytest.raises(ValueError, match="output_dir is the folder of the base model"):
            run(path, *more)
    resume.remove_run(tmp_path / "base")  # of another trainer, not of blocktune
    assert sorted((tmp_path / "base").iterdir()) == before


def test_overwrite_removes_the_earlier_run_alone(tmp_path):
    path = write_run(tmp_path, num_links=1, **OPTIONS)
    run(path)
    (tmp_path / "out/notes.txt").write_text("mine")
    (tmp_path / "out/checkpoint-mine").mkdir()
    run(path, "--overwrite", "--num_links", "0", "--max_steps", "1", "--save_strategy", "no")
    names = {entry.name for entry in (tmp_path / "out").iterdir()}
    assert {"notes.txt", "checkpoint-mine", "adapter_model.safetensors"} <= names
    assert not names & {"links.safetensors", "checkpoint-2", "checkpoint-4"}
    load_model(adapter=tmp_path / "out", device="cpu")
    with pytest.raises(ValueError, match="leave out resume_from_checkpoint"):
        run(path, "--overwrite", "--resume_from_checkpoint", "true")


def test_overwrite_keeps_the_earlier_run_until_the_new_one_has_a_checkpoint(tmp_path, stop):
    path = write_run(tmp_path, **OPTIONS)
    run(path)
    out = tmp_path / "out"
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StagedSaving, "_save_checkpoint", _interrupted)
        with pytest.raises(KeyboardInterrupt, match="no checkpoint is saved yet"):
            run(path, "--overwrite", "--seed", "7")
    assert {file: file.stat().st_mtime_ns for file in out.rglob("*")} == before
    stop(2)
    with pytest.raises(KeyboardInterrupt, match="checkpoint-2; repeat the command without"):
        run(path, "--overwrite", "--seed", "7")
    assert not {"checkpoint-4", "blocktune.json"} & {file.name for file in out.iterdir()}
    stop(None)
    run(path, "--seed", "7")
    assert AdapterInfo.load(out).training["seed"] == 7


def _interrupted(*_):
    raise KeyboardInterrupt


def test_a_run_without_a_step_saves_nothing(tmp_path):
    path = write_run(tmp_path, train_limit=1, dataloader_drop_last=True)
    with pytest.raises(ValueError, match="nothing was trained: 1 rows are less than one batch"):
        run(path)
    assert not (tmp_path / "out/blocktune.json").exists()


def test_overwrite_leaves_nothing_of_a_full_model(tmp_path):
    run(write_run(tmp_path, use_peft=None))
    assert (tmp_path / "out/config.json").is_file()
    run(write_run(tmp_path), "--overwrite")
    assert not (tmp_path / "out/config.json").exists()
    assert not (tmp_path / "out/generation_config.json").exists()


def test_the_printed_command_names_what_loads(tmp_path, capsys):
    """A full model is its own base: with `--model` its adapter would be refused."""
    run(write_run(tmp_path, use_peft=None))
    said = capsys.readouterr().out.splitlines()[-1]
    assert said.endswith(f": blocktune answer --adapter {tmp_path / 'out'}")
    assert load_model(adapter=tmp_path / "out", device="cpu").info is not None
    with pytest.raises(ValueError, match=r"made for base .*; leave out the base"):
        load_model(str(tmp_path / "base"), tmp_path / "out", device="cpu")


@pytest.mark.parametrize("text", ["[1]", "training: 3", "data: {}", "training: {}"])
def test_settings_that_are_none_are_refused(stopped, tmp_path, text):
    (tmp_path / "out/checkpoint-2/resolved_config.yaml").write_text(text)
    with pytest.raises(ValueError, match="does not have the settings of a run; remove the check"):
        run(stopped)


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "adapter_model.safetensors"]
)
def test_a_damaged_checkpoint_is_one_line(stopped, tmp_path, name):
    path = tmp_path / "out/checkpoint-2" / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=f"{name}' is damaged or incomplete"):
        run(stopped)
    path.unlink()
    with pytest.raises(ValueError, match=r"lacks (the|one of) .*remove the checkpoint"):
        run(stopped)
    (path.parent / "blocktune.json").write_bytes(b"\x80")
    with pytest.raises(ValueError, match=r"blocktune.json: not JSON .*; remove the checkpoint"):
        run(stopped)
    shutil.rmtree(path.parent)
    run(stopped)  # from the start


def test_a_checkpoint_that_is_not_there(tmp_path):
    path = write_run(tmp_path, **OPTIONS)
    for value, words in (
        ("true", "there is no checkpoint in"),
        ("nowhere", "no checkpoint 'nowhere'"),
    ):
        with pytest.raises(ValueError, match=words):
            run(path, "--resume_from_checkpoint", value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lora_target_modules": "nothing_proj"}, "nothing_proj"),
        ({"max_length": 3}, "the limit is 3"),
        ({"train_data": "worlds:test?n=2"}, "is a test split"),
        ({"report_to": "wandb"}, "report_to"),
    ],
)
def test_a_refused_run_leaves_no_folder(tmp_path, options, words):
    path = write_run(tmp_path, **options, output_dir=str(tmp_path / "made/by/it"))
    with pytest.raises(ValueError, match=words):
        run(path)
    assert not (tmp_path / "made").exists()


def test_the_trainer_refuses_too(stopped, tmp_path):
    kept = yaml.safe_load(stopped.read_text())
    names = BlockSFTConfig.__dataclass_fields__
    options = {key: value for key, value in kept.items() if key in names}
    args = BlockSFTConfig(**options | {"learning_rate": 1e-4})
    base, rows = kept["model_name_or_path"], toy_examples(64)
    lora = LoraConfig(r=4, lora_alpha=64, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = BlockSFTTrainer(base, args, train_dataset=rows, peft_config=lora)
    words = r"other settings: (learning_rate 0\.005 -> 0\.0001|lora_alpha 32 -> 64|; ){3}\. Repeat"
    with pytest.raises(ValueError, match=words):
        trainer.train(resume_from_checkpoint=True)
