"""Soak test: half an hour of full load on two replicas with a shared store that fails at times.

    python eval/server/soak.py data/tiny --minutes 30 --output eval/results/server/soak.json

Every answer is compared with that of the engine in this process. Each replica has its own folder,
and both share a Valkey server (if valkey-server or redis-server is installed; else they share a
folder). These faults take turns: the second replica is killed (SIGKILL, possibly while it writes)
and restarted; the first one's folder is moved away for some seconds, or replaced by a file; Valkey
is killed and restarted empty. Writes the counts, the memory of the first replica over time, and a
plot beside the output. The exit code is 1 if an answer was wrong or lost, or the memory grew by
more than 5 % in the second half of the time.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import psutil
from traffic import (
    Timed,
    ask,
    blocktune_command,
    corpus,
    free_port,
    machine,
    server,
    wait_for,
    zipf,
)

METHODS = ("naive", "cacheblend", "epic", "full-prefill")
VALKEY = shutil.which("valkey-server") or shutil.which("redis-server")


def expected(model: str, asks: list, tokens: int) -> dict[tuple[int, str], str]:
    """The engine's answers by request and method."""
    from blocktune.data import RagExample
    from blocktune.engine import Engine
    from blocktune.prompt import Chunk

    engine = Engine.from_pretrained(model)
    examples = [
        RagExample(one.question, tuple(Chunk(text, title) for title, text in one.documents))
        for one in asks
    ]
    return {
        (index, method): answer.text
        for method in METHODS
        for index, answer in enumerate(engine.answer(examples, method, max_new_tokens=tokens))
    }


class Soak:
    """Clients that ask until they are stopped; a failed request is retried on the other replica."""

    def __init__(self, urls: list[str], asks: list, truth: dict, tokens: int):
        self.urls, self.asks, self.truth, self.tokens = urls, asks, truth, tokens
        self.counts = {"answers": 0, "wrong": 0, "retried": 0, "lost": 0}
        self.first_wrong: list[str] = []
        self.stopping = threading.Event()
        self._lock = threading.Lock()

    def client(self, seed: int) -> None:
        rng = random.Random(seed)
        with httpx.Client(timeout=300) as client:
            while not self.stopping.is_set():
                index, method = rng.randrange(len(self.asks)), rng.choice(METHODS)
                body = self.asks[index].body(self.tokens, method)
                urls = rng.sample(self.urls, len(self.urls))
                for url in (*urls, self.urls[0]):
                    client.base_url = url
                    answer = ask(client, body)
                    if answer.error is None:
                        break
                    self._count("retried")
                self._judge(answer, index, method)

    def _judge(self, answer: Timed, index: int, method: str) -> None:
        if answer.error is not None:
            self._count("lost", answer.error)
        elif answer.text != self.truth[index, method]:
            reason = f"{method}: {answer.text!r} instead of {self.truth[index, method]!r}"
            self._count("wrong", reason)
        else:
            self._count("answers")

    def _count(self, name: str, reason: str | None = None) -> None:
        with self._lock:
            self.counts[name] += 1
            if reason is not None and len(self.first_wrong) < 10:
                self.first_wrong.append(reason)


@contextmanager
def clients(soak: Soak, count: int) -> Iterator[None]:
    threads = [threading.Thread(target=soak.client, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        soak.stopping.set()
        for thread in threads:
            thread.join()


def take_away(store: Path, seconds: float, as_file: bool) -> None:
    """Moves the store's folder away for a while; with ``as_file`` a file takes its place."""
    aside = store.with_name("aside")
    store.rename(aside)
    if as_file:
        with suppress(IsADirectoryError):  # a server has created the folder again
            store.write_text("not a folder")
    time.sleep(seconds)
    if store.is_dir():
        shutil.rmtree(store)
    else:
        store.unlink(missing_ok=True)
    aside.rename(store)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--documents", type=int, default=200)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--requests", type=int, default=40, help="distinct requests")
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--store-gb", type=float, default=0.02, help="so small that it evicts")
    parser.add_argument("--every", type=float, default=30, help="seconds between two faults")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    documents = corpus(args.model, args.documents, args.chunk_tokens)
    asks = zipf(documents, args.requests, 6, 1.0)
    truth = expected(args.model, asks, args.tokens)
    with tempfile.TemporaryDirectory() as folder:
        report = run(args, asks, truth, Path(folder))
    args.output.write_text(json.dumps(report) + "\n")
    plot(report, args.output.with_suffix(".png"))
    print(json.dumps({k: v for k, v in report.items() if k != "samples"}, indent=1))
    return int(bool(report["wrong"] or report["lost"] or report["growth"] > 0.05))


class Faults:
    """Starts the servers and injects faults in turns; `counts` has the number of each.

    Args:
        args: The command line.
        folder: Folder for stores and logs.
    """

    def __init__(self, args: argparse.Namespace, folder: Path):
        self.log, self.pause = folder / "servers.log", min(10, args.every / 3)
        self.ports, self.valkey_port = [free_port(), free_port()], free_port()
        self.valkey = self._start_valkey() if VALKEY else None
        places = [folder / "first", folder / "second" if VALKEY else folder / "first"]
        remote = f",remote=valkey://127.0.0.1:{self.valkey_port}/0" if VALKEY else ""
        self.store = places[0]
        self.commands = [
            blocktune_command(
                *(args.model, port, "--store", f"{place}{remote}"),
                *("--store-gb", str(args.store_gb)),
            )
            for port, place in zip(self.ports, places, strict=True)
        ]
        self.second = self._start(self.commands[1])
        names = ["kill_replica", "folder_gone", "folder_a_file", *(["kill_valkey"] * bool(VALKEY))]
        self.counts = dict.fromkeys(names, 0)
        self._turns = itertools.cycle(names)

    def next(self) -> None:
        """Injects the next fault."""
        name = next(self._turns)
        getattr(self, name)()
        self.counts[name] += 1

    def kill_replica(self) -> None:
        self.second.send_signal(signal.SIGKILL)
        self.second.wait()
        self.second = self._start(self.commands[1])

    def folder_gone(self) -> None:
        take_away(self.store, self.pause, as_file=False)

    def folder_a_file(self) -> None:
        take_away(self.store, self.pause, as_file=True)

    def kill_valkey(self) -> None:
        self.valkey.kill()
        self.valkey.wait()
        time.sleep(self.pause)
        self.valkey = self._start_valkey()

    def close(self) -> None:
        for process in filter(None, (self.second, self.valkey)):
            process.kill()
            process.wait()

    def _start(self, command: list[str]) -> subprocess.Popen:
        with self.log.open("a") as file:
            return subprocess.Popen(command, stdout=file, stderr=file)

    def _start_valkey(self) -> subprocess.Popen:
        return self._start([VALKEY, "--port", str(self.valkey_port), "--save", ""])


def run(args: argparse.Namespace, asks: list, truth: dict, folder: Path) -> dict[str, Any]:
    samples, faults = [], Faults(args, folder)
    with (
        closing(faults),
        server(faults.commands[0], faults.ports[0], faults.log) as (url, first),
    ):
        other = f"http://127.0.0.1:{faults.ports[1]}"
        wait_for(other, faults.second, faults.log)
        soak = Soak([url, other], asks, truth, args.tokens)
        memory, started, next_fault = psutil.Process(first.pid), time.monotonic(), args.every
        with clients(soak, args.clients):
            while (now := time.monotonic() - started) < 60 * args.minutes:
                state = memory.memory_info().rss, memory.num_fds(), soak.counts["answers"]
                samples.append((round(now, 1), *state))
                if now > next_fault:
                    faults.next()
                    next_fault = now + args.every
                time.sleep(min(5, args.every / 10))
        end = httpx.get(f"{url}/metrics").text
    half = [rss for at, rss, _, _ in samples if at > samples[-1][0] / 2]
    quarter = max(1, len(half) // 4)
    growth = statistics.median(half[-quarter:]) / statistics.median(half[:quarter]) - 1
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        **soak.counts,
        "faults": faults.counts,
        "growth": round(growth, 4),
        "unfinished": [line for line in end.splitlines() if line.startswith("blocktune_kv_bytes ")],
        "first_wrong": soak.first_wrong,
        "samples": samples,
    }


def plot(report: dict[str, Any], path: Path) -> None:
    """Plots memory and answers over time."""
    import matplotlib as mpl

    mpl.use("Agg")
    import matplotlib.pyplot as plt

    seconds, rss, _, answers = zip(*report["samples"], strict=True)
    figure, axis = plt.subplots(figsize=(7, 3.2), layout="constrained")
    axis.plot([s / 60 for s in seconds], [r / 1e6 for r in rss], color="#1f5fbf")
    axis.set(xlabel="minutes", ylabel="memory of the server, MB", ylim=(0, max(rss) / 1e6 * 1.1))
    right = axis.twinx()
    right.plot([s / 60 for s in seconds], answers, color="#8a8f94", linewidth=1)
    right.set_ylabel("answers")
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
