"""The whole of blocktune on one page: train two adapters, answer from cached chunks, compare.

    python recipes/demo.py        # or `make demo`, which sets everything up first

Everything it makes lies in out/demo. About seven minutes on two cores, no network.
"""

import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from rich.console import Console
from rich.panel import Panel

from blocktune.commands.options import quiet_libraries
from blocktune.evaluation.compare import findings
from blocktune.evaluation.report.terminal import run_and_show
from blocktune.evaluation.suite import load_suite

OUTPUT = Path("out/demo")
SUITE = "eval/suites/demo.yaml"
DATA = ("--train_data", "worlds:train?seed=1&n=1200&turns=8", "--num_train_epochs", "1")
"""75 steps, none of the contexts seen twice: the loss has fallen by then."""
INTRODUCTION = """\
Retrieved passages come back in every request, yet a model that was trained as usual can reuse \
their cached keys and values only if the same passages stood before them. Joined as they are \
('naive'), chunks cached alone do not know of each other: "she" in one no longer finds the name \
in another.

This demo trains that away on a tiny model, then measures what every method costs and saves."""

console = Console(width=100)


def step(number: int, title: str) -> None:
    console.rule(f"[bold]{number}. {title}", align="left")


def train(recipes: tuple[str, ...]) -> None:
    """Trains all recipes at once, one thread each: on few cores faster than one after another."""
    threads = max(1, (os.cpu_count() or 1) // len(recipes))
    runs = []
    for recipe in recipes:
        arguments = ["train", "--config", f"recipes/{recipe}.yaml", "--output_dir"]
        arguments += [str(OUTPUT / recipe), *DATA]
        console.print(f"[cyan]$ blocktune {' '.join(arguments)}")
        process = subprocess.Popen(
            [sys.executable, "-u", "-m", "blocktune.cli", *arguments],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        reader = threading.Thread(target=relay, args=(recipe, process))
        reader.start()
        runs.append((recipe, process, reader))
    for recipe, process, reader in runs:
        reader.join()
        if process.wait():
            sys.exit(f"error: training {recipe} failed with exit code {process.returncode}")


def relay(recipe: str, process: subprocess.Popen) -> None:
    for line in process.stdout:
        print(f"{recipe:16}{line}", end="")


def main() -> None:
    start = time.monotonic()
    sys.stdout.reconfigure(line_buffering=True)  # in order with the runs below, also in a pipe
    shutil.rmtree(OUTPUT, ignore_errors=True)  # all numbers below are made in this run
    quiet_libraries()
    console.print(Panel(INTRODUCTION, title="blocktune", title_align="left"))
    step(1, "Fine-tune: chunks that see only themselves, without links and with (KVLink)")
    train(("block_attention", "kvlink"))
    step(2, "Ask every method the same held-out questions")
    console.print(f"[cyan]$ blocktune eval --suite {SUITE} --output {OUTPUT}")
    command = ["python", "recipes/demo.py"]
    results = run_and_show(load_suite(SUITE), OUTPUT, "Held-out questions", command)
    step(3, "What it says")
    for sentence in findings(results):
        console.print(f"- {sentence}", highlight=False)
    minutes = (time.monotonic() - start) / 60
    console.print(
        f"\nDone in {minutes:.1f} minutes. Table and times: {OUTPUT}/results.json; picture: "
        f"{OUTPUT}/results.png; every answer: {OUTPUT}/rows/; adapters: "
        f"{OUTPUT}/block_attention, {OUTPUT}/kvlink.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
