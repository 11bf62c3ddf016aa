"""The deployment files name commands and options that exist."""

from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from blocktune.cli import app

FOLDER = Path(__file__).resolve().parents[2] / "deploy/vllm"
VLLMS = {"--host", "--port"}


def lines() -> list[list[str]]:
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    found = [one["entrypoint"] + one["command"] for one in compose.values()]
    for document in yaml.safe_load_all((FOLDER / "kubernetes.yaml").read_text()):
        if document["kind"] == "Deployment":
            found += [one["command"] for one in document["spec"]["template"]["spec"]["containers"]]
    return found


@pytest.mark.parametrize("line", lines(), ids=" ".join)
def test_every_option_exists(line):
    assert line[0] == "blocktune"
    command, rest = get_command(app), line[1:]
    while rest[0] in getattr(command, "commands", ()):
        command, rest = command.commands[rest[0]], rest[1:]
    known = {option for parameter in command.params for option in parameter.opts} | VLLMS
    options = [word for word in rest if word.startswith("--")]
    assert "--store" in options
    assert set(options) <= known


def test_images_are_built_from_files_that_exist():
    compose = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    for one in compose.values():
        assert (FOLDER / one["build"]["context"] / one["build"]["dockerfile"]).is_file()
