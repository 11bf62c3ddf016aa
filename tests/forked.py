"""Programs in processes of their own, without the seconds that importing torch takes each time.

They are forked from one process that has imported the libraries and done nothing else.
"""

import contextlib
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

import valkey_server

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ["transformers.models.llama.modeling_llama", "blocktune.training.run", "blocktune.server"]
FORKS = multiprocessing.get_context("forkserver")


class Program:
    """What Python runs by `words`, as ``["-m", "blocktune.cli", "methods"]`` or ``["a.py"]``."""

    def __init__(self, words, env=None, cwd=ROOT):
        self._folder = tempfile.TemporaryDirectory()
        self.out, self.err = (Path(self._folder.name) / name for name in ("out", "err"))
        self.out.touch(), self.err.touch()
        words = [str(word) for word in words]
        given = words, env or {}, str(cwd), str(self.out), str(self.err)
        self._process = FORKS.Process(target=_program, args=given)
        with _importable():
            self._process.start()
        self.pid = self._process.pid
        self.kill, self.terminate = self._process.kill, self._process.terminate

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit code; raises TimeoutExpired if it is still running then."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked program", timeout, self.out.read_bytes())
        return self._process.exitcode

    def done(self, timeout: float = 300) -> subprocess.CompletedProcess:
        """As `subprocess.run` returns it."""
        code = self.wait(timeout)
        return subprocess.CompletedProcess((), code, self.out.read_text(), self.err.read_text())


def run(words, env=None, cwd=ROOT) -> subprocess.CompletedProcess:
    """Runs a program to its end."""
    return Program(words, env, cwd).done()


def run_ranks(count: int, words, env=None) -> subprocess.CompletedProcess:
    """Runs a program in several processes that meet, as a launcher would start them."""
    if count == 1:
        return run(words, env)
    port = str(valkey_server.free_port())
    one_machine = (env or {}) | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    one_machine |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count))
    ranks = [
        Program(words, one_machine | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(count)
    ]
    done = [rank.done() for rank in ranks]
    out, err = ("".join(getattr(one, name) for one in done) for name in ("stdout", "stderr"))
    return subprocess.CompletedProcess((), max(abs(one.returncode) for one in done), out, err)


@contextlib.contextmanager
def _importable():
    """The server of forks starts with the first program and imports from where pytest does."""
    FORKS.set_forkserver_preload(HEAVY)
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _program(words, env, cwd, out, err):
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1) for fd in (1, 2))
    os.environ.update(env)
    os.chdir(cwd)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).parent))
        runpy.run_path(words[0], run_name="__main__")
