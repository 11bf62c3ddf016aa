"""Trains every recipe with every seed, resumes interrupted runs, and reads their cost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from blocktune.adapter import INFO_FILE, AdapterInfo
from blocktune.training.run import earlier_run, parse

STATE_FILE = "trainer_state.json"


@dataclass(frozen=True)
class Run:
    """One training run: a recipe with a seed.

    Attributes:
        recipe: YAML file of the recipe.
        seed: Replaces the recipe's seed.
        output: Folder of all adapters.
        worlds: Further options of the worlds that the recipe trains on, e.g. ``crowded=1``.
    """

    recipe: Path
    seed: int
    output: Path
    worlds: str = ""

    @property
    def name(self) -> str:
        return self.recipe.stem

    @property
    def folder(self) -> Path:
        return self.output / f"{self.name}-{self.seed}"

    @property
    def is_complete(self) -> bool:
        """Whether the run has finished: the trainer writes its state after the weights."""
        return (self.folder / INFO_FILE).exists() and (self.folder / STATE_FILE).exists()

    def refuse_other_recipe(self) -> None:
        """Raises ValueError if the recipe has changed since the folder was trained."""
        earlier_run(*parse(_words(self._options())))

    def _options(self) -> dict[str, Any]:
        options = {"config": self.recipe, "seed": self.seed, "output_dir": self.folder}
        if self.worlds:
            options["train_data"] = f"{load_recipe(self.recipe)['train_data']}&{self.worlds}"
        return options

    def command(self) -> list[str]:
        return [sys.executable, "-u", "-m", "blocktune.cli", "train", *_words(self._options())]


def load_recipe(path: Path) -> dict[str, Any]:
    """The keys of a recipe."""
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def train_all(runs: Sequence[Run], jobs: int) -> None:
    """Trains runs that are not complete, ``jobs`` at a time, each with its own ``train.log``."""
    for run in runs:
        run.refuse_other_recipe()
    missing = [run for run in runs if not run.is_complete]
    print(f"{len(runs) - len(missing)} of {len(runs)} adapters are trained", flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda run: _train(run, jobs), missing))


def cost_of(run: Run) -> dict[str, Any]:
    """Tokens, seconds, trainable parameters, steps and examples of a complete run."""
    state = json.loads((run.folder / STATE_FILE).read_text())
    logs = [entry for entry in state["log_history"] if "tokens_per_second" in entry]
    tokens, seconds, before = 0.0, 0.0, 0.0
    for entry in logs:
        # The token count restarts when a run is resumed; the time before that still counts.
        new = entry["num_tokens"] - (before if entry["num_tokens"] >= before else 0)
        tokens, before = tokens + new, entry["num_tokens"]
        seconds += new / entry["tokens_per_second"]
    return {
        "tokens": round(tokens),
        "seconds": round(seconds, 1),
        "trainable_parameters": sum(map(_num_parameters, run.folder.glob("*.safetensors"))),
        "steps": state["global_step"],
        "examples": AdapterInfo.load(run.folder).training["examples"],
    }


def _train(run: Run, jobs: int) -> None:
    run.folder.mkdir(parents=True, exist_ok=True)
    print(f"training {run.folder}", flush=True)
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // jobs))
    with (run.folder / "train.log").open("a") as log:
        finished = subprocess.run(
            run.command(),
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": threads},
            check=False,
        )
    if code := finished.returncode:
        lines = (run.folder / "train.log").read_text().strip().splitlines()
        raise ValueError(f"training {run.folder} failed: {lines[-1] if lines else code}")


def _num_parameters(path: Path) -> int:
    with safe_open(path, "pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
    total = 0
    for shape in shapes:
        count = 1
        for side in shape:
            count *= side
        total += count
    return total


def _words(options: dict[str, Any]) -> list[str]:
    return [word for key, value in options.items() for word in (f"--{key}", str(value))]
