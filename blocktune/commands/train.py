"""`blocktune train`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from blocktune.commands import command
from blocktune.commands import options as opt
from blocktune.commands.errors import resumable

RESUME = "add --resume_from_checkpoint true to continue from the last one"
PASS_ON = {"allow_extra_args": True, "ignore_unknown_options": True}


@command(
    "train",
    "blocktune train --config recipes/block_attention.yaml",
    "blocktune train --config recipes/kvlink.yaml --learning_rate 1e-3 --output_dir out/k",
    "blocktune train --config recipes/kvlink.yaml --dry-run   # only show the plan",
    "blocktune train --launcher recipes/accelerate/zero2.yaml --config R.yaml",
    "blocktune train --config R.yaml --train_data mine.jsonl --model_name_or_path M",
    "blocktune train --config R.yaml --resume_from_checkpoint true   # after a stop",
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
    from blocktune.training.run import parse, train

    with resumable("checkpoints are in the output folder", RESUME):
        if processes is None and launcher is None:
            from blocktune.hub import Publisher

            train(arguments, publisher=Publisher())
            return
        if launcher is not None and not Path(launcher).is_file():
            raise ValueError(f"no launcher configuration '{launcher}'; see recipes/accelerate")
        parse(arguments)  # a mistake is reported here once, not by every process
        code = _launch(processes, launcher, ["-m", "blocktune.cli", "train", *arguments])
    if code < 0:  # the process could not report it
        raise ValueError(
            f"a training process was ended by signal {-code}; after signal 9 check the machine's "
            "memory. Nothing after the last checkpoint was saved"
        )
    raise typer.Exit(code)


def _launch(processes: int | None, launcher: str | None, program: list[str]) -> int:
    """Exit code of a program in several processes: the first failure's, negative after a signal."""
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
