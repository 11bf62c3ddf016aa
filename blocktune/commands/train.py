"""`blocktune train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from blocktune.commands import command
from blocktune.commands import options as opt

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
    from blocktune.training.run import FINISHED, earlier_run, how_to_continue, parse, train

    if processes is None and launcher is None:
        from blocktune.hub import Publisher

        train(arguments, publisher=Publisher())
        return
    data, args, choice = parse(arguments)  # a mistake is reported once, not by every process
    found = earlier_run(data, args, choice, None if launcher else processes)
    if found == Path(args.output_dir) and not args.dry_run:
        typer.echo(FINISHED)
        return
    from blocktune.commands.launching import launch

    try:
        launch(processes, launcher, ["-m", "blocktune.cli", "train", *arguments])
    except KeyboardInterrupt:
        raise KeyboardInterrupt(how_to_continue(args)) from None
