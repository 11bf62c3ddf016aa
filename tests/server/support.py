"""Servers over data/tiny: in this process, and as a process of its own."""

import re
import time
from contextlib import contextmanager
from pathlib import Path

import forked
import httpx

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "data" / "tiny"
CHAT = "/v1/chat/completions"
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
    """`blocktune serve` on a free port: a client, the process, and what it has written so far."""
    command = ["-m", "blocktune.cli", "serve", "--model", str(TINY), "--port", "0", "--skip-check"]
    running = forked.Program([*command, *options])
    try:
        while not (found := re.search(r"running on (http://[\d.]+:\d+)", running.err.read_text())):
            assert running.poll() is None, running.err.read_text()
            time.sleep(0.02)
        with httpx.Client(base_url=found[1], timeout=60) as client:
            yield client, running
    finally:
        running.kill()
        running.wait()


def metric(text: str, name: str) -> float:
    """The value of a metric in Prometheus' text."""
    return float(re.search(rf"^blocktune_{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


def refused(response, status: int, *words: str) -> None:
    assert response.status_code == status, response.text
    message = response.json()["error"]["message"]
    assert "\n" not in message
    for word in words:
        assert word in message


def wait_until(condition) -> None:
    for _ in range(6000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it did not come to that")
