"""A demo of blocktune: train two adapters, answer from cached chunks, compare methods.

    python recipes/demo.py        # or `make demo`, which sets everything up first

All output is in out/demo. It takes three to six minutes on two cores and needs no network.
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
"""75 steps without repeated contexts, enough for the loss to fall."""
INTRODUCTION = """\
The same retrieved passages recur in many requests. A model that was trained as usual can reuse \
their cached keys and values only if the same passages come before them. Chunks that were cached \
separately and are simply joined ('naive') do not see each other: "she" in one chunk no longer \
finds the name in another.

This demo trains a tiny model on such chunks, then measures what each method costs and saves."""

console = Console(width=100)


def step(number: int, title: str) -> None:
    console.rule(f"[bold]{number}. {title}", align="left")


def train(recipes: tuple[str, ...]) -> None:
    """Trains all recipes in parallel, which on few cores is faster than one after another."""
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
    sys.stdout.reconfigure(line_buffering=True)  # keeps the order with output of the runs
    shutil.rmtree(OUTPUT, ignore_errors=True)  # so that all numbers are from this run
    quiet_libraries()
    console.print(Panel(INTRODUCTION, title="blocktune", title_align="left"))
    step(1, "Fine-tune on chunks that do not see each other, without and with links (KVLink)")
    train(("block_attention", "kvlink"))
    step(2, "Answer the same held-out questions with every method")
    console.print(f"[cyan]$ blocktune eval --suite {SUITE} --output {OUTPUT}")
    command = ["python", "recipes/demo.py"]
    results = run_and_show(load_suite(SUITE), OUTPUT, "Held-out questions", command)
    step(3, "Findings")
    for sentence in findings(results):
        console.print(f"- {sentence}", highlight=False)
    minutes = (time.monotonic() - start) / 60
    console.print(
        f"\nDone in {minutes:.1f} minutes. Table and times: {OUTPUT}/results.json; plot: "
        f"{OUTPUT}/results.png; every answer: {OUTPUT}/rows/; adapters: "
        f"{OUTPUT}/block_attention, {OUTPUT}/kvlink.",
        highlight=False,
    )


if __name__ == "__main__":
    main()
