"""`blocktune train`: in this process, or in several whose failures are one line."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from blocktune.commands import command
from blocktune.commands import options as opt
from blocktune.commands.errors import FAILURES
from blocktune.parsing import load_yaml, mapping

PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@command(
    "train",
    "blocktune train --config recipes/block_attention.yaml",
    "blocktune train --config recipes/kvlink.yaml --learning_rate 1e-3 --output_dir out/k",
    "blocktune train --config recipes/kvlink.yaml --dry-run   # only show the plan",
    "blocktune train --launcher recipes/accelerate/zero2.yaml --config R.yaml",
    "blocktune train --config R.yaml --train_data mine.jsonl --model_name_or_path M "
    "--output_dir out/mine",
    "blocktune train --config R.yaml --overwrite   # forget the earlier run in its folder",
    "A stopped command continues from its last checkpoint: repeat it.",
    "Every key of the YAML is also an option and overrides the file: see --help-all.",
    context_settings=PASS_ON,
)
def train(
    ctx: typer.Context,
    config: Annotated[str | None, Option(help="YAML file of the run.")] = None,
    processes: Annotated[
        int | None, Option(min=1, help="Number of processes to start on this machine.")
    ] = None,
    launcher: Annotated[
        str | None, Option(help="YAML of `accelerate config`, for DeepSpeed or several machines.")
    ] = None,
    help_all: Annotated[
        bool, Option("--help-all", help="List every key of the YAML, and exit.")
    ] = False,
) -> None:
    """Fine-tune a model to answer from separately cached chunks, with or without link tokens."""
    arguments = [*(["--config", config] if config else []), *ctx.args]
    opt.quiet_libraries()
    if help_all:
        from blocktune.training.console import print_options

        print_options()
        return
    from blocktune.training.resume import stoppable
    from blocktune.training.run import FINISHED, earlier_run, parse, train

    if processes is None and launcher is None:
        from blocktune.hub import Publisher

        train(arguments, publisher=Publisher())
        return
    data, args, choice = parse(arguments)  # a mistake is reported once, not by every process
    found = earlier_run(data, args, choice, None if launcher else processes)
    if found == Path(args.output_dir) and not args.dry_run:
        typer.echo(FINISHED)
        return
    with stoppable(args.output_dir, args.overwrite):
        launch(processes, launcher, ["-m", "blocktune.cli", "train", *arguments])


def launch(processes: int | None, launcher: str | None, program: list[str]) -> None:
    """Runs a program in several processes: by torchrun, or as a YAML of accelerate says.

    Raises:
        ValueError: What a process refused, or that it was ended by a signal.
        typer.Exit: After a crash, whose one line is printed; with exit code 1.
        KeyboardInterrupt: After Ctrl-C.
    """
    if launcher is not None:
        hint = "see recipes/accelerate"
        mapping(load_yaml(launcher, "launcher configuration", hint), launcher)
    folder = Path(tempfile.mkdtemp(prefix="blocktune-train-"))
    os.environ[FAILURES] = str(folder)
    try:
        code = _run(processes, launcher, program)
    finally:
        del os.environ[FAILURES]
    failed = sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime)
    if code == 0 or not failed:
        shutil.rmtree(folder)
    if code < 0:  # the process could not report it
        raise ValueError(
            f"a training process was ended by signal {-code}; after signal 9 check the machine's "
            "memory. Nothing after the last checkpoint was saved"
        )
    if code and failed:
        line, *trace = failed[0].read_text().splitlines()
        if not trace:
            shutil.rmtree(folder)
            raise ValueError(line)
        print(f"error: process {failed[0].stem} failed: {line}; see {failed[0]}", file=sys.stderr)
    raise typer.Exit(code)


def _run(processes: int | None, launcher: str | None, program: list[str]) -> int:
    """Exit code: the first failure's, negative after a signal."""
    import logging
    import subprocess

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's own default, without its warning
    try:
        if launcher is None:  # accelerate would start one process on a machine without GPUs
            from torch.distributed.run import main

            main(["--nproc_per_node", str(processes), *program])
        else:
            from accelerate.commands.launch import launch_command, launch_command_parser

            count = ["--num_processes", str(processes)] if processes else []
            options = ["--config_file", launcher, *count, *program]
            launch_command(launch_command_parser().parse_args(options))
    except ChildFailedError as error:
        return error.get_first_failure()[1].exitcode
    except subprocess.CalledProcessError as error:
        return error.returncode
    except SignalException:
        raise KeyboardInterrupt from None
    return 0
