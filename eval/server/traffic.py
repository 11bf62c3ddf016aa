"""Starts servers to measure, and makes requests whose chunks recur by a Zipf law."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from transformers import AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]
CHAT = "/v1/chat/completions"
NAMES = ("Anna", "Walter", "Noel", "Mira", "Otto", "Clara", "Ivan", "Ruth", "Hugo", "Vera")
PLACES = ("Kirby", "Lorne", "Alder", "Marsh", "Fenwick", "Dunmore", "Selby", "Hythe", "Orford")


@dataclass(frozen=True)
class Ask:
    """One request: a question about documents, each of which has a title and a text."""

    question: str
    documents: tuple[tuple[str, str], ...]

    def body(self, tokens: int, method: str | None) -> dict[str, Any]:
        """The JSON body for our server, or (None) for others, with the documents in the message."""
        body = {"temperature": 0, "max_tokens": tokens, "stream": True}
        if method is None:
            text = "\n\n".join(f"{title}\n{text}" for title, text in self.documents)
            return body | {"messages": [{"role": "user", "content": f"{text}\n\n{self.question}"}]}
        body |= {"documents": [{"title": t, "text": x} for t, x in self.documents]}
        body |= {"messages": [{"role": "user", "content": self.question}]}
        usage = {"stream_options": {"include_usage": True}}
        return body | usage | {"blocktune": {"method": method}}


def corpus(model: str, documents: int, tokens: int, seed: int = 0) -> list[tuple[str, str]]:
    """Titles and texts of about ``tokens`` tokens each, with facts about invented people."""
    tokenizer, rng = AutoTokenizer.from_pretrained(model), random.Random(seed)

    def fact() -> str:
        name = f"{rng.choice(NAMES)} {rng.choice(PLACES)}"
        return f"{name} is in {rng.choice(('Upper', 'Lower', 'Port', 'New'))} {rng.choice(PLACES)}."

    per_fact = sum(len(tokenizer(fact())["input_ids"]) for _ in range(50)) / 50
    count = max(1, round(tokens / per_fact))
    return [
        (f"Record {index}", " ".join(fact() for _ in range(count))) for index in range(documents)
    ]


def zipf(
    documents: list[tuple[str, str]], requests: int, chunks: int, power: float, seed: int = 0
) -> list[Ask]:
    """Requests of distinct chunks; the k-th chunk is drawn with a weight of ``1 / k^power``."""
    rng = random.Random(seed)
    weights = [(index + 1) ** -power for index in range(len(documents))]
    asks = []
    for _ in range(requests):
        drawn: dict[int, None] = {}
        while len(drawn) < min(chunks, len(documents)):
            drawn[rng.choices(range(len(documents)), weights)[0]] = None
        name = f"{rng.choice(NAMES)} {rng.choice(PLACES)}"
        asks.append(Ask(f"Where is {name}?", tuple(documents[index] for index in drawn)))
    return asks


@dataclass
class Timed:
    """One streamed answer with its times, as a client measures them."""

    ttft_s: float = 0.0  # time to first token
    gaps_s: tuple[float, ...] = ()  # times between tokens
    text: str = ""
    own: dict[str, Any] | None = None  # the field ``blocktune`` of our server's answers
    error: str | None = None  # reason of a failure; the other fields are then unset


def ask(client: httpx.Client, body: dict[str, Any]) -> Timed:
    """Sends a request and reads its stream; a failure is returned as `Timed.error`."""
    started, times, text, own = time.perf_counter(), [], "", None
    try:
        with client.stream("POST", CHAT, json=body) as response:
            if response.status_code != 200:
                return Timed(error=f"{response.status_code} {response.read()[:200]!r}")
            for line in response.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                event = json.loads(line[6:])
                if "error" in event:
                    return Timed(error=str(event["error"]))
                own = event.get("blocktune") or own
                for choice in event.get("choices", ()):
                    new = choice["delta"].get("content") or ""
                    text += new
                    if new or choice.get("finish_reason"):
                        times.append(time.perf_counter())
    except httpx.HTTPError as error:
        return Timed(error=f"{type(error).__name__}: {error}")
    if not times:
        return Timed(error="an empty stream")
    gaps = tuple(after - before for before, after in itertools.pairwise(times))
    return Timed(times[0] - started, gaps, text, own)


def ask_all(url: str, bodies: list[dict[str, Any]], clients: int) -> tuple[list[Timed], float]:
    """Sends requests in order, ``clients`` at a time; returns the answers and the total seconds."""
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    started = time.perf_counter()
    with (
        httpx.Client(base_url=url, timeout=1800, limits=limits) as client,
        ThreadPoolExecutor(clients) as pool,
    ):
        answers = list(pool.map(lambda body: ask(client, body), bodies))
    return answers, time.perf_counter() - started


def free_port() -> int:
    """A TCP port that no process listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def blocktune_command(model: str, port: int, *options: str) -> list[str]:
    """The command that starts our server without its check at start-up."""
    run = [sys.executable, "-m", "blocktune.cli", "serve", "--model", model, "--skip-check"]
    return [*run, "--port", str(port), *options]


@contextmanager
def server(command: list[str], port: int, log: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    """Runs a server inside the context; yields its URL and process. Its output goes to ``log``."""
    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, env=env, cwd=ROOT)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(url, process, log)
        yield url, process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen, log: Path, seconds: float = 300) -> None:
    """Waits until the server answers; raises SystemExit if it ends or takes too long."""
    for _ in range(int(seconds / 0.2)):
        if process.poll() is not None:
            raise SystemExit(f"the server ended, {log} says why:\n{log.read_text()[-2000:]}")
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.2)
    raise SystemExit(f"no server after {seconds:g} s; see {log}")


def machine() -> dict[str, Any]:
    """Facts about this machine, to record with measurements."""
    import torch
    import transformers

    text = Path("/proc/cpuinfo").read_text()
    match = re.search(r"model name\s*: (.*)", text)
    return {
        "cpu": match[1] if match else "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
