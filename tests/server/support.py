"""Servers over data/tiny: in this process, and as a process of its own."""

import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny"
QUESTION = "Where is Anna Belt?"
DOCUMENTS = [
    {"id": "a", "title": "Anna Belt", "text": "Anna Belt is in Kirby."},
    {"id": "b", "data": {"title": "Gray", "snippet": "Walter Gray lives in Upper Lorne."}},
    "The film Frozen Shore was shot in Port Alder.",
]


def chat(question: str = QUESTION, documents=DOCUMENTS, **more) -> dict:
    """The body of a greedy request."""
    body = {"messages": [{"role": "user", "content": question}], "temperature": 0}
    return body | {"documents": documents, "max_tokens": 12} | more


@contextmanager
def process(*options: str):
    """`blocktune serve` on a free port; its address and the process."""
    command = [sys.executable, "-u", "-m", "blocktune.cli", "serve", "--model", str(TINY)]
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    running = subprocess.Popen(
        [*command, "--port", "0", "--skip-check", *options],
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        cwd=ROOT,
    )
    lines: list[str] = []
    try:
        for line in running.stderr:
            lines.append(line)
            if found := re.search(r"running on (http://[\d.]+:\d+)", line):
                break
        else:
            raise AssertionError("".join(lines))
        reader = threading.Thread(target=lambda: lines.extend(running.stderr), daemon=True)
        reader.start()
        with httpx.Client(base_url=found[1], timeout=60) as client:
            yield client, running, lines
    finally:
        running.kill()
        running.wait()


def metric(text: str, name: str) -> float:
    """The value of a metric in Prometheus' text."""
    return float(re.search(rf"^blocktune_{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])
