"""`blocktune train`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from blocktune.commands.options import quiet_libraries, teach

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


def add_to(app: typer.Typer) -> None:
    """Registers the command."""
    app.command(
        "train",
        context_settings=PASS_ON,
        epilog=teach(
            "blocktune train --config recipes/block_attention.yaml",
            "blocktune train --config recipes/kvlink.yaml --learning_rate 1e-3 --output_dir out/k",
            "blocktune train --config recipes/kvlink.yaml --dry-run   # only show the plan",
            "blocktune train --launcher recipes/accelerate/zero2.yaml --config R.yaml",
            "blocktune train --config R.yaml --train_data mine.jsonl --model_name_or_path M",
            "Any key of the YAML is an option too, and wins over the file: --help-all shows them.",
        ),
    )(train)


def train(
    ctx: typer.Context,
    config: Annotated[str | None, typer.Option(help="YAML file of the run.")] = None,
    processes: Annotated[
        int | None, typer.Option(min=1, help="Processes to start on this machine.")
    ] = None,
    launcher: Annotated[
        str | None, typer.Option(help="Configuration of accelerate: DeepSpeed, several machines.")
    ] = None,
    help_all: Annotated[
        bool, typer.Option("--help-all", help="Show every key that a YAML may hold, and exit.")
    ] = False,
) -> None:
    """Fine-tune a model so that its chunks can be cached alone (or with link tokens between)."""
    arguments = [*(["--config", config] if config else []), *ctx.args]
    quiet_libraries()
    if help_all:
        from blocktune.training.options_help import print_options

        print_options()
        return
    from blocktune.training.run import parse, train

    if processes is None and launcher is None:
        from blocktune.hub import Publisher

        train(arguments, publisher=Publisher())
        return
    if launcher is not None and not Path(launcher).is_file():
        raise ValueError(f"no launcher configuration '{launcher}'; see recipes/accelerate")
    parse(arguments)  # a mistake is said here once, not by every process
    done = subprocess.run(_launch(processes, launcher, arguments), check=False)
    if done.returncode < 0:  # killed, mostly for memory: nobody else says so
        raise ValueError(
            f"the launcher was ended by signal {-done.returncode} and nothing was saved after its "
            "last checkpoint; with signal 9 look at the machine's memory first"
        )
    raise typer.Exit(done.returncode)


def _launch(processes: int | None, launcher: str | None, arguments: list[str]) -> list[str]:
    """The command line that starts this very command in several processes."""
    if launcher is None:  # accelerate would start one process on a machine without GPUs
        start = ["torch.distributed.run", "--nproc_per_node", str(processes)]
    else:
        start = ["accelerate.commands.launch", "--config_file", launcher]
        start += ["--num_processes", str(processes)] if processes else []
    return [sys.executable, "-m", *start, "-m", "blocktune.cli", "train", *arguments]
