"""Breaks one line of the core at a time and checks that a test notices.

    python tests/mutations/run.py                  # all, a few minutes on two cores
    python tests/mutations/run.py --only mask keys # those whose name holds one of the words
    python tests/mutations/run.py --write          # also writes outcome.md

Each mutation in `mutations.yaml` names a file, a piece of its text that occurs once, what to put in
its place, and the tests that must fail then. The tests run in a copy of the repository,
in a process forked from one that has imported the libraries already.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

os.environ.setdefault("OMP_NUM_THREADS", "1")
for library in ("torch", "transformers.models.llama.modeling_llama", "trl"):
    importlib.import_module(library)  # forked processes inherit them

FORK = multiprocessing.get_context("fork")

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
COPIED = (
    "blocktune",
    "tests",
    "recipes",
    "eval",
    "data",
    "examples",
    "pyproject.toml",
    "README.md",
)
TIMEOUT_S = 600


@dataclass(frozen=True)
class Mutation:
    """One broken line.

    Attributes:
        name: What breaks, in a few words.
        file: Relative to the repository.
        old: Text that occurs exactly once in the file.
        new: What replaces it.
        tests: Arguments of pytest.
    """

    name: str
    file: str
    old: str
    new: str
    tests: str


def load() -> list[Mutation]:
    entries = yaml.safe_load((HERE / "mutations.yaml").read_text(encoding="utf-8"))
    return [Mutation(**entry) for entry in entries]


def copy_tree(folder: Path) -> Path:
    """A copy of what the tests need, without results and caches."""
    skipped = shutil.ignore_patterns("__pycache__", "results", "*.pyc", "out")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=skipped)
        elif source.exists():
            shutil.copy(source, folder / name)
    return folder


def run_tests(folder: Path, tests: str, log: Path) -> int | None:
    """Runs tests against the copy up to the first failure; pytest's exit code, None: timed out."""
    process = FORK.Process(target=_run_pytest, args=(folder, tests, log))
    process.start()
    process.join(TIMEOUT_S)
    if process.is_alive():
        process.kill()
        process.join()
        return None
    return process.exitcode


def _run_pytest(folder: Path, tests: str, log: Path) -> None:
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    os.environ |= {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    sys.dont_write_bytecode = True
    sys.path.insert(0, str(folder))
    code = pytest.main(["-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests.split()])
    sys.stdout.flush()
    os._exit(code)


def outcome_of(mutation: Mutation, folder: Path) -> tuple[str, float, str]:
    """``caught``, ``survived`` or ``error``, the seconds it took, and the test that failed."""
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutation.old) != 1:
        return "error", 0.0, f"the text occurs {text.count(mutation.old)} times"
    log = folder / "pytest.log"
    started = time.monotonic()
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")
    try:
        code = run_tests(folder, mutation.tests, log)
    finally:
        path.write_text(text, encoding="utf-8")
    seconds = time.monotonic() - started
    said = log.read_text(encoding="utf-8")
    failed = [line for line in said.splitlines() if line.startswith(("FAILED", "ERROR"))]
    if code == 0:
        return "survived", seconds, ""
    if code == 1 and failed:
        return "caught", seconds, failed[0].split(" - ")[0].removeprefix("FAILED ")
    return "error", seconds, "timed out" if code is None else said.strip()[-200:]


def run(mutations: list[Mutation], workers: int) -> list[tuple[Mutation, str, float, str]]:
    with tempfile.TemporaryDirectory() as name, ProcessPoolExecutor(workers, FORK) as pool:
        folders = [copy_tree(Path(name) / str(index)) for index in range(workers)]
        require_sound(folders[0], mutations)
        shares = [mutations[index::workers] for index in range(workers)]
        done = [entry for part in pool.map(run_share, folders, shares) for entry in part]
    order = {mutation.name: index for index, mutation in enumerate(mutations)}
    return sorted(done, key=lambda entry: order[entry[0].name])


def require_sound(folder: Path, mutations: list[Mutation]) -> None:
    """Ends the program if a test fails in the copy although nothing is broken there."""
    tests = dict.fromkeys(test for mutation in mutations for test in mutation.tests.split())
    log = folder / "pytest.log"
    if run_tests(folder, " ".join(tests), log) != 0:
        raise SystemExit(f"tests fail before anything is broken:\n{log.read_text()[-1000:]}")


def run_share(folder: Path, share: list[Mutation]) -> list[tuple[Mutation, str, float, str]]:
    found = []
    for mutation in share:
        found.append((mutation, *outcome_of(mutation, folder)))
        _, outcome, seconds, test = found[-1]
        print(f"{outcome:9}{seconds:5.0f} s  {mutation.name}  {test}", flush=True)
    return found


def report(done: list[tuple[Mutation, str, float, str]]) -> str:
    caught = sum(outcome == "caught" for _, outcome, *_ in done)
    rows = [
        f"| {mutation.name} | `{mutation.file.removeprefix('blocktune/')}` | {outcome} | `{test}` |"
        for mutation, outcome, _, test in done
    ]
    return "\n".join(
        [
            "# Mutations",
            "",
            f"{caught} of {len(done)} broken lines were caught by a test "
            "(`python tests/mutations/run.py --write`).",
            "",
            "| what was broken | file | outcome | first test that failed |",
            "|---|---|---|---|",
            *rows,
            "",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", default=[""], help="words of the names to run")
    parser.add_argument("--write", action="store_true", help="write outcome.md")
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    chosen = [m for m in load() if any(word in m.name for word in given.only)]
    done = run(chosen, given.workers)
    if given.write:
        (HERE / "outcome.md").write_text(report(done), encoding="utf-8")
    if missed := [mutation.name for mutation, outcome, *_ in done if outcome != "caught"]:
        raise SystemExit(f"{len(missed)} of {len(done)} not caught: {', '.join(missed)}")
    print(f"all {len(done)} caught")


if __name__ == "__main__":
    main()
