"""`blocktune train`, in this process or several, `merge` and `push`."""

import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument

from blocktune.commands import options as opt
from blocktune.commands.application import FAILURES, command
from blocktune.commands.options import option
from blocktune.parsing import load_yaml, mapping


@command(
    "blocktune train --config recipes/block_attention.yaml",
    "blocktune train --config recipes/kvlink.yaml --learning_rate 1e-3 --output_dir out/k",
    "blocktune train --config recipes/kvlink.yaml --dry-run   # only the plan",
    "blocktune train --launcher recipes/accelerate/zero2.yaml --config R.yaml",
    "blocktune train --config R.yaml --train_data mine.jsonl --model_name_or_path M "
    "--output_dir out/mine",
    "blocktune train --config R.yaml --overwrite   # replace an earlier run",
    "A stopped command continues from its last checkpoint: repeat it.",
    "Every key of the YAML is also an option and overrides the file: see --help-all.",
    context_settings=opt.PASS_ON,
)
def train(
    ctx: typer.Context,
    config: option(str | None, "YAML file with the settings of the run.") = None,
    processes: option(int | None, "Processes to start here. Default: only this one.", min=1) = None,
    launcher: option(str | None, "YAML of `accelerate config`: DeepSpeed, many machines.") = None,
    help_all: option(bool, "List every key of the YAML, and exit.", "--help-all") = False,
) -> None:
    """Fine-tune a model to answer from separately cached chunks, with or without link tokens."""
    opt.quiet_libraries()
    if help_all:
        from blocktune.training.plan import print_options

        print_options()
        return
    from blocktune.training.resume import stoppable
    from blocktune.training.run import earlier_run, finished, leave, parse, train

    arguments = [*(["--config", config] if config else []), *ctx.args]
    if processes is None and launcher is None:
        from blocktune.hub import Publisher

        train(arguments, publisher=Publisher())
        leave()
        return
    data, args, choice = parse(arguments)  # here, so that an error is reported only once
    earlier = earlier_run(data, args, choice, None if launcher else processes)
    if earlier == Path(args.output_dir) and not args.dry_run:
        typer.echo(finished(data, args.output_dir))
        return
    with stoppable(args.output_dir, args.overwrite):
        launch(processes, launcher, ["-m", "blocktune.cli", "train", *arguments])


def launch(processes: int | None, launcher: str | None, program: list[str]) -> None:
    """Runs a program by torchrun or accelerate, and exits; ValueError: a signal, or a mistake."""
    if launcher is not None:
        mapping(load_yaml(launcher, "launcher configuration", "see recipes/accelerate"), launcher)
    with tempfile.TemporaryDirectory() as folder:
        os.environ[FAILURES] = folder
        try:
            code = _run(processes, launcher, program)
        finally:
            del os.environ[FAILURES]
        failed = sorted(Path(folder).iterdir(), key=lambda path: path.stat().st_mtime)
        reports = [(path.stem, path.read_text()) for path in failed]
    if code < 0:  # killed, so the process could not report anything
        hint = "after signal 9 check the machine's memory"
        raise ValueError(f"a training process was ended by signal {-code}; {hint}")
    if code and reports:
        rank, report = reports[0]
        line, *trace = report.splitlines()
        if not trace:
            raise ValueError(line)
        with tempfile.NamedTemporaryFile("w", prefix="blocktune-train-", delete=False) as kept:
            kept.write(report)
        print(f"error: process {rank} failed: {line}; see {kept.name}", file=sys.stderr)
    raise typer.Exit(code)


def _run(processes: int | None, launcher: str | None, program: list[str]) -> int:
    """Runs the program and returns the exit code of the first failure, negative for a signal."""
    import logging
    import subprocess

    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # torchrun's default; avoids its warning
    try:
        if launcher is None:  # not accelerate, which starts only one process without GPUs
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
    except ImportError as error:
        if error.name is not None:
            raise
        raise ValueError(f"'{launcher}': {error}") from None  # such as a missing DeepSpeed
    return 0


@command(
    "blocktune merge out/block --output out/merged",
    "blocktune answer --adapter out/merged -i questions.jsonl --method block-attention",
    "blocktune merge out/kvlink --output out/merged-links --links added_tokens",
    "An adapter trained on a 4-bit base is merged into the unquantized base; the command "
    "measures how much quantizing the result again would change the logits.",
)
def merge(
    adapter: Annotated[str, Argument(help="Adapter: a folder, or USER/NAME\\[@REVISION].")],
    output: opt.to_folder("New folder for the model.", kind=Path),
    model: opt.Model = None,
    links: option(str | None, "table (a file) or added_tokens. Default: as trained.") = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Merge an adapter into its base and report how much the logits change."""
    opt.quiet_libraries()
    from blocktune.adapter.merge import merge_adapter

    report = merge_adapter(adapter, output, model=model, dtype=dtype, device=device, links=links)
    close = f"logits within {report.max_abs_diff:.1e} of base and adapter"
    top = f"largest logit {report.max_abs_logit:.1f}, same top token in {report.same_top1:.1%}"
    lines = [f"merged into {report.output}: {close} ({top} of the probe)"]
    if (diff := report.requantised_max_abs_diff) is not None:
        what = f"the merged weights are not quantized, as the {report.quantization} base"
        lines.append(f"{what} of the training was; quantized again, logits differ by {diff:.1e}")
    opt.tell(as_json, asdict(report), *lines)


@command(
    "blocktune push out/block --repo USER/NAME --dry-run   # files and card",
    "blocktune push out/block --repo USER/NAME --results out/eval/results.json",
    "blocktune push out/block --repo USER/NAME --base-model ORG/BASE --license apache-2.0",
    "blocktune answer --adapter USER/NAME -i questions.jsonl --method block-attention",
    "Log in first with `hf auth login`, or set HF_TOKEN.",
)
def push(
    adapter: Annotated[Path, Argument(help="Folder from `blocktune train` or `merge`.")],
    repo: option(str, "USER/NAME on the HF Hub; created if missing."),
    dry_run: option(bool, "Check and show files and card; upload nothing.", "--dry-run") = False,
    private: option(bool, "Make the repository private if it is new.", "--private") = False,
    base_model: option(str | None, "Name of the base on the Hub, if the run had a copy.") = None,
    license: option(str | None, "Such as apache-2.0. Default: the base's on the Hub.") = None,
    dataset: option(list[str] | None, "Training data set on the Hub; repeatable.") = None,
    results: option(Path | None, "results.json of `blocktune eval`, for the card.") = None,
    model: opt.Model = None,
    dtype: opt.Dtype = "auto",
    device: opt.Device = None,
) -> None:
    """Publish an adapter on the Hugging Face Hub, if `blocktune check` passes on it."""
    opt.quiet_libraries()
    from rich.console import Console

    from blocktune.hub import CardFacts, prepare, send, show

    facts = CardFacts(base_model, license, tuple(dataset or ()), results)
    files = prepare(adapter, repo, facts, model=model, dtype=dtype, device=device)
    console = Console()
    if dry_run:
        show(repo, files, console)
        return
    sent = send(repo, files, private=private)
    console.print(f"pushed {len(files)} files to {sent.repo_url}", soft_wrap=True)
    console.print(f"load it with --adapter {repo}@{sent.oid}", soft_wrap=True)
