"""CPU seconds of commands that need no model, and of a first answer by data/tiny.

    python eval/bench/startup.py --repeats 5

Prints the minimum and the median of each, and those of an empty Python program. One run before them
is not counted: it writes the bytecode of what was not yet imported in this environment.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys

CLI = [sys.executable, "-m", "blocktune.cli"]
ASK = ["-c", "Anna lives in Rome.", "-q", "Where does Anna live?", "--method", "naive"]
COMMANDS = {
    "python": [sys.executable, "-c", "pass"],
    "blocktune --help": [*CLI, "--help"],
    "blocktune methods": [*CLI, "methods"],
    "blocktune answer": [*CLI, "answer", "--model", "data/tiny", *ASK],
}


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one process and its children."""
    env = os.environ | {"NO_COLOR": "1"}
    env.pop("PYTHONDONTWRITEBYTECODE", None)  # with it every process compiles what it imports
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True, env=env)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    for name, command in COMMANDS.items():
        spent = [cpu_seconds(command) for _ in range(repeats + 1)][1:]
        print(f"{name:18} {min(spent):6.2f} s  median {statistics.median(spent):.2f} s")
