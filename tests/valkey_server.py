"""A real Valkey (or Redis) for tests, on a port of its own."""

import shutil
import socket
import subprocess
import time

PROGRAM = shutil.which("valkey-server") or shutil.which("redis-server")


def free_port() -> int:
    with socket.socket() as made:
        made.bind(("127.0.0.1", 0))
        return made.getsockname()[1]


def start(port: int) -> subprocess.Popen:
    """Starts it, empty, and waits until it listens."""
    command = [PROGRAM, "--port", str(port), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_for(port, process)
    return process


def wait_for(port: int, process: subprocess.Popen) -> None:
    """Waits until a server listens."""
    for _ in range(600):
        with socket.socket() as asked:
            if not asked.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.05)
    process.kill()
    raise AssertionError("the server does not listen")
