"""Several processes of one command: started, and their failures reported in one line."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from pathlib import Path

import typer

from blocktune.commands.errors import FAILURES
from blocktune.parsing import load_yaml, mapping


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
