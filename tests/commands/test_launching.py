"""Several processes: what fails in one of them is one line."""

import re
import tempfile

import pytest
import typer

from blocktune.commands import train as launching

PROGRAM = """
import os, sys, typer
from blocktune.commands.application import OneLineErrors

app = typer.Typer(cls=OneLineErrors, pretty_exceptions_enable=False)

@app.callback()
def root(debug: bool = False):
    pass

@app.command()
def go(how: str):
    if os.environ["RANK"] == "1" or how == "all":
        kind = RuntimeError if how == "crash" else ValueError
        raise kind("it was\\nrank " + os.environ["RANK"])

app()
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


@pytest.mark.alone
def test_a_crash_of_one_process_is_one_line_with_its_trace_in_a_file(program, capfd):
    with pytest.raises(typer.Exit) as stop:
        launching.launch(2, None, [program, "go", "crash"])
    assert stop.value.exit_code == 1
    line = capfd.readouterr().err
    found = re.fullmatch(r"error: process 1 failed: RuntimeError: it was rank 1; see (.*)\n", line)
    with open(found[1]) as trace:
        assert "raise kind(" in trace.read()


def test_a_stopped_launch_leaves_no_files(tmp_path, monkeypatch):
    def stopped(*_):
        assert list(tmp_path.iterdir())  # the folder for errors
        raise KeyboardInterrupt

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(launching, "_run", stopped)
    with pytest.raises(KeyboardInterrupt):
        launching.launch(2, None, [])
    assert not list(tmp_path.iterdir())


def test_a_launcher_without_its_package_is_one_line(monkeypatch):
    monkeypatch.setattr("accelerate.commands.launch.is_deepspeed_available", lambda: False)
    with pytest.raises(ValueError, match=r"zero2\.yaml': DeepSpeed is not installed"):
        launching.launch(2, "recipes/accelerate/zero2.yaml", ["program.py"])


@pytest.mark.alone
@pytest.mark.parametrize(("how", "rank"), [("one", "1"), ("all", "[01]")])
def test_a_refusal_of_any_process_is_the_error(program, capfd, how, rank):
    with pytest.raises(ValueError, match=f"^it was rank {rank}$"):
        launching.launch(2, None, [program, "go", how])
    assert capfd.readouterr() == ("", "")
