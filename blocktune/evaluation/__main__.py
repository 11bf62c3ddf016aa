"""``accelerate launch -m blocktune.evaluation``: `blocktune eval` over processes and GPUs."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from blocktune.evaluation.cli_output import run_and_show
from blocktune.evaluation.suite import changed, load_suite


def main(arguments: list[str] | None = None) -> int:
    """Runs a suite in this process and those that were launched with it.

    Returns:
        The exit code: 2 after a user error, which the main process reports in one line.
    """
    parser = argparse.ArgumentParser("blocktune.evaluation", description=__doc__)
    parser.add_argument("--suite", type=Path, required=True, help="YAML of what to run")
    parser.add_argument("--output", type=Path, required=True, help="folder for rows and results")
    parser.add_argument("--limit", type=int, help="only the first questions of each task")
    for name in ("model", "device", "quantize", "store"):
        parser.add_argument(f"--{name}", help=f"instead of the suite's {name}")
    given = parser.parse_args(arguments)
    try:
        suite = changed(
            load_suite(given.suite),
            *(given.limit, given.model, given.device, given.quantize, given.store),
        )
        run_and_show(suite, given.output, given.suite.stem)
    except (ValueError, OSError) as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
