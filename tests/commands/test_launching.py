"""Several processes: what fails is one line, and a lock that nobody holds is named."""

import os
import re
import threading
import time

import pytest
import typer

from blocktune.commands import launching

PROGRAM = """
import os, sys, typer
from blocktune.commands.errors import OneLineErrors

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


@pytest.mark.alone
@pytest.mark.parametrize(("how", "rank"), [("one", "1"), ("all", "[01]")])
def test_a_refusal_of_any_process_is_the_error(program, capfd, how, rank):
    with pytest.raises(ValueError, match=f"^it was rank {rank}$"):
        launching.launch(2, None, [program, "go", how])
    assert capfd.readouterr() == ("", "")


def test_a_lock_is_waited_for_or_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    launching.wait_for_builds()
    lock = tmp_path / "cpu_adam/lock"
    lock.parent.mkdir()
    descriptor = os.open(lock, os.O_CREAT | os.O_EXCL)

    def release():
        time.sleep(0.3)
        os.remove(lock)
        os.close(descriptor)

    thread = threading.Thread(target=release)
    thread.start()
    launching.wait_for_builds()
    thread.join()
    assert capsys.readouterr().out.startswith("waiting for another process to build")
    lock.touch()  # of a process that was killed
    with pytest.raises(ValueError, match=f"rm '{lock}'"):
        launching.wait_for_builds()
