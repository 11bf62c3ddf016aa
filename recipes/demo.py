"""The whole of blocktune on one page: train two adapters, answer from cached chunks, compare.

    python recipes/demo.py        # or `make demo`, which sets everything up first

Everything it makes lies in out/demo. About a quarter of an hour on two cores, no network.
"""

import shutil
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.panel import Panel

from blocktune.commands.evaluate import run_and_show
from blocktune.evaluation.findings import findings
from blocktune.evaluation.suite import load_suite

OUTPUT = Path("out/demo")
SUITE = "eval/suites/demo.yaml"
INTRODUCTION = """\
Retrieved passages come back in every request, yet a model that was trained as usual can reuse \
their cached keys and values only if the same passages stood before them. Joined as they are \
('naive'), chunks cached alone do not know of each other: "she" in one no longer finds the name \
in another.

This demo trains that away on a tiny model, then measures what every method costs and saves."""

console = Console(width=100)


def step(number: int, title: str) -> None:
    console.rule(f"[bold]{number}. {title}", align="left")


def train(recipe: str) -> None:
    arguments = ["train", "--config", f"recipes/{recipe}.yaml", "--output_dir"]
    arguments.append(str(OUTPUT / recipe))
    console.print(f"[cyan]$ blocktune {' '.join(arguments)}")
    subprocess.run([sys.executable, "-u", "-m", "blocktune.cli", *arguments], check=True)


def main() -> None:
    start = time.monotonic()
    sys.stdout.reconfigure(line_buffering=True)  # in order with the runs below, also in a pipe
    shutil.rmtree(OUTPUT, ignore_errors=True)  # all numbers below are made in this run
    console.print(Panel(INTRODUCTION, title="blocktune", title_align="left"))
    step(1, "Fine-tune: chunks that see only themselves (block attention)")
    train("block_attention")
    step(2, "Fine-tune: the same, with trained link tokens between chunks (KVLink)")
    train("kvlink")
    step(3, "Ask every method the same held-out questions")
    console.print(f"[cyan]$ blocktune eval --suite {SUITE} --output {OUTPUT}")
    command = ["python", "recipes/demo.py"]
    results = run_and_show(load_suite(SUITE), OUTPUT, "Held-out questions", command)
    step(4, "What it says")
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
