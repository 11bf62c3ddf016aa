"""The files in deploy/: every command in them is one of ours, and what they name exists."""

import re
import shlex
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from typer.main import get_command

from blocktune.commands import app

ROOT = Path(__file__).resolve().parents[1]
DEPLOY = ROOT / "deploy"
COMPOSE = [DEPLOY / "compose.yaml", DEPLOY / "vllm/compose.yaml"]
DOCKERFILES = [DEPLOY / "Dockerfile", DEPLOY / "vllm/Dockerfile"]
VLLMS = {"--host", "--port"}
"""Options that `blocktune vllm serve` hands on."""
VALUES = dict.fromkeys(("BLOCKTUNE_API_KEY", "BLOCKTUNE_STORE_KEY"), "value-of-the-variable")
VALUES |= {"MODEL": "/model"}


def instructions(path: Path) -> list[tuple[str, str]]:
    """Of a Dockerfile, with their continuation lines."""
    text = re.sub(r"^#.*\n", "", path.read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]


def services(path: Path) -> dict:
    return yaml.safe_load(path.read_text())["services"]


def words(given: str | list[str]) -> list[str]:
    """Of a command; variables have a value."""
    split = shlex.split(given) if isinstance(given, str) else given
    return [re.sub(r"\$[({](\w+)[^)}]*[)}]", lambda found: VALUES[found[1]], one) for one in split]


def commands() -> list[list[str]]:
    """All that start blocktune."""
    image = dict(instructions(DEPLOY / "Dockerfile"))
    entry, default = (yaml.safe_load(image[name]) for name in ("ENTRYPOINT", "CMD"))
    found = [entry + default, yaml.safe_load(dict(instructions(DOCKERFILES[1]))["ENTRYPOINT"])]
    for path in COMPOSE:
        for one in services(path).values():
            if "build" in one:
                found.append(words(one.get("entrypoint", entry)) + words(one["command"]))
    for document in yaml.safe_load_all((DEPLOY / "vllm/kubernetes.yaml").read_text()):
        if document["kind"] == "Deployment":
            containers = document["spec"]["template"]["spec"]["containers"]
            found += [words(one["command"]) for one in containers]
    unit = (DEPLOY / "blocktune.service").read_text()
    started = words(re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)[1])
    return [*found, ["blocktune", *started[1:]]]


@pytest.mark.parametrize("line", commands(), ids=" ".join)
def test_every_command_parses(line):
    assert line[0] == "blocktune"
    command, rest = get_command(app), line[1:]
    while rest and rest[0] in getattr(command, "commands", ()):
        command, rest = command.commands[rest[0]], rest[1:]
    assert not hasattr(command, "commands"), "a group was named, no command"
    if line[1] == "vllm":
        known = {option for parameter in command.params for option in parameter.opts} | VLLMS
        assert {word for word in rest if word.startswith("--")} <= known
        return
    command.make_context(line[1], rest)
    with pytest.raises(Exception, match="No such option"):
        command.make_context(line[1], [*rest, "--no-such-option"])


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_an_image_is_made_of_what_exists(path):
    steps = instructions(path)
    for name, value in steps:
        if name == "COPY":
            assert all((ROOT / source).exists() for source in value.split()[:-1]), value
        if name == "HEALTHCHECK":
            check = yaml.safe_load(value.partition("CMD ")[2])
            compile(check[check.index("-c") + 1], "HEALTHCHECK", "exec")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installs = " ".join(value for name, value in steps if name == "RUN")
    for extras in re.findall(r"\.\[([\w,]+)\]", installs):
        assert set(extras.split(",")) <= set(project["optional-dependencies"])
    assert subprocess.run(["sh", "-n"], input=installs, text=True, check=False).returncode == 0
    if "constraints.txt |" in installs or "'^torch=='" in installs:
        pins = (ROOT / "constraints.txt").read_text().splitlines()
        assert sum(pin.startswith("torch==") for pin in pins) == 1


@pytest.mark.parametrize("path", COMPOSE, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_compose_file_names_what_it_has(path):
    whole = yaml.safe_load(path.read_text())
    for one in whole["services"].values():
        assert ("build" in one) != ("image" in one)
        assert set(one.get("depends_on", ())) <= set(whole["services"])
        assert {c["source"] for c in one.get("configs", ())} <= set(whole.get("configs", ()))
        if "build" in one:
            assert (path.parent / one["build"]["context"] / one["build"]["dockerfile"]).is_file()
        named = [v.split(":")[0] for v in one.get("volumes", ()) if v[0] not in "/$"]
        assert set(named) <= set(whole.get("volumes", ()))


if shutil.which("systemd-analyze"):

    def test_systemd_reads_the_unit(tmp_path):
        text = (DEPLOY / "blocktune.service").read_text()
        unit = tmp_path / "blocktune.service"
        unit.write_text(text.replace("/opt/blocktune/bin/blocktune", "/bin/true"))
        command = ["systemd-analyze", "verify", "--man=no", str(unit)]
        made = subprocess.run(command, capture_output=True, text=True)
        assert [line for line in made.stderr.splitlines() if "blocktune.service" in line] == []
