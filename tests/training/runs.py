"""Runs of the trainer on the toy model, as a user's YAML would ask for them."""

from pathlib import Path

import yaml
from training.toy import save_toy, toy_examples

from blocktune.data.example import write_jsonl
from blocktune.training.run import build, parse

DEFAULTS = {
    "use_peft": True,
    "lora_r": 4,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "gradient_checkpointing": False,
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
}


def write_run(folder: Path, **overrides) -> Path:
    """A folder with a base, examples and a YAML; returns the YAML's path."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "base").exists():
        save_toy(folder / "base")
        write_jsonl(folder / "train.jsonl", toy_examples(64))
    values = DEFAULTS | {
        "train_data": str(folder / "train.jsonl"),
        "model_name_or_path": str(folder / "base"),
        "output_dir": str(folder / "out"),
    }
    path = folder / "run.yaml"
    values = {key: value for key, value in (values | overrides).items() if value is not None}
    path.write_text(yaml.safe_dump(values))
    return path


def make_trainer(folder: Path, **overrides):
    """A trainer that has not started."""
    return build(*parse(["--config", str(write_run(folder, **overrides))]))


def losses(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
