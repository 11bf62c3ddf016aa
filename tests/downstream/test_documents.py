"""What README and documents say to type is there, and their snippets run as they stand."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from blocktune.cli import app
from blocktune.data import load_examples
from blocktune.evaluation.suite import parse_suite
from blocktune.training.run import Parser

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [
        *ROOT.glob("*.md"),
        *ROOT.glob("docs/*.md"),
        *ROOT.glob("recipes/**/*.md"),
        ROOT / "eval/README.md",
    ]
)


def blocks(path: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)


def commands(text: str) -> list[list[str]]:
    """Command lines of blocktune, comments and continuations resolved."""
    lines = text.replace("\\\n", " ").splitlines()
    return [
        shlex.split(line, comments=True)
        for line in lines
        if line.startswith("blocktune ") or "recipes/train.py" in line
    ]


def unknown_options(words: list[str]) -> list[str]:
    """Options that the command does not have."""
    known = {"--help", "--plugin", "--config"}
    training = {option for action in Parser()._actions for option in action.option_strings}
    if words[0] == "accelerate":
        given = words[words.index("recipes/train.py") + 1 :]
        known |= training
    else:
        command, given = get_command(app), words[1:]
        known |= _options(command)
        while given and given[0] in getattr(command, "commands", ()):
            command, given = command.commands[given[0]], given[1:]
            known |= _options(command) | (training if command.name == "train" else set())
    return [word for word in given if word.startswith("-") and word.partition("=")[0] not in known]


def _options(command) -> set[str]:
    return {option for parameter in command.params for option in parameter.opts}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_of_every_command_that_is_shown(path):
    for block in blocks(path, "bash"):
        for words in commands(block):
            assert not unknown_options(words), words


def test_options_of_every_command_that_opens_a_file():
    for path in [*ROOT.glob("recipes/**/*.yaml"), *ROOT.glob("eval/suites/*.yaml")]:
        opening = [line[2:] for line in path.read_text().splitlines()[:3] if line.startswith("# ")]
        for words in commands("\n".join(opening)):
            assert not unknown_options(words), words


def test_an_option_that_is_not_there_is_found():
    assert unknown_options(["blocktune", "answer", "--modle", "x"]) == ["--modle"]
    assert unknown_options(["blocktune", "train", "--num_linx=3"]) == ["--num_linx=3"]


def test_python_of_the_readme_runs():
    snippets = [block for block in blocks(ROOT / "README.md", "python") if "@register" not in block]
    assert len(snippets) == 2
    for snippet in snippets:
        done = subprocess.run(
            [sys.executable, "-c", snippet], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_method_that_is_shown_keeps_the_contract(name, tmp_path):
    (snippet,) = (block for block in blocks(ROOT / name, "python") if "@register" in block)
    (tmp_path / "mine.py").write_text(snippet)
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "blocktune.cli",
            "check",
            "--method",
            "sinks",
            "--plugin",
            "mine.py",
        ],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},  # this tree, wherever the package is installed
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ["README.md", "docs/data.md"])
def test_records_that_are_shown_load(name, tmp_path):
    (record,) = blocks(ROOT / name, "json")
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(json.loads(record)))
    (example,) = load_examples(path)
    assert len(example.chunks) == 2
    assert example.target


def test_the_suite_that_is_shown_is_one():
    (text,) = (block for block in blocks(ROOT / "README.md", "yaml") if "tasks:" in block)
    suite = parse_suite(yaml.safe_load(text))
    assert [spec.adapter for spec in suite.methods] == [None, None, None, "out/llama-kvlink"]
    trained = next(
        words[words.index("--instruction") + 1]
        for block in blocks(ROOT / "README.md", "bash")
        for words in commands(block)
        if "--instruction" in words
    )
    assert suite.tasks[0].prompt["instruction"] == trained
