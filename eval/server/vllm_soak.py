"""Soak test of `blocktune vllm serve`: three clients send requests with and without documents.

    python eval/server/vllm_soak.py data/tiny --minutes 5 --output eval/results/bench/vllm_soak.json

It needs vLLM. Every answer with documents is compared with that of the engine in this process, and
every answer without with the server's answer before the load. The exit code is 1 if an answer
differs, or the memory of the server's processes grows by more than 5 % in the second half of the
time.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx

from blocktune import Engine
from blocktune.data.worlds import WorldConfig, generate_examples
from blocktune.provenance import provenance

PORT, TOKENS, CLIENTS = 8321, 12, 3
QUESTIONS = WorldConfig("test", 5, 24, (4, 10), kinds={"cross-chunk": 1.0})
OPTIONS = (
    "--dtype",
    "float32",
    "--enforce-eager",
    "--max-model-len",
    "1024",
    "--max-num-seqs",
    "8",
)


def body(example, documents: bool) -> dict:
    chat = {"messages": [{"role": "user", "content": example.question}], "temperature": 0}
    named = [{"title": one.title, "text": one.text} for one in example.chunks]
    return chat | {"max_tokens": TOKENS} | ({"documents": named} if documents else {})


def ask(client: httpx.Client, example, documents: bool) -> str:
    response = client.post("/v1/chat/completions", json=body(example, documents))
    return response.raise_for_status().json()["choices"][0]["message"]["content"].strip()


def resident(pid: int) -> int:
    """Resident memory of a process and its descendants, in bytes."""
    listed = subprocess.run(
        ["ps", "-eo", "pid,ppid,rss"], capture_output=True, text=True, check=True
    )
    rows = [tuple(map(int, line.split())) for line in listed.stdout.splitlines()[1:]]
    family = {pid}
    for _ in rows:
        family |= {child for child, parent, _ in rows if parent in family}
    return sum(rss for child, _, rss in rows if child in family) << 10


def load(
    client: httpx.Client,
    examples: list,
    wanted: dict[tuple[int, bool], str],
    seconds: float,
    pid: int,
) -> tuple[list[int], list, dict[bool, int]]:
    """Asks at full load; returns the server's memory over time, wrong answers, counts by kind."""
    memory, wrong, counts = [], [], {True: 0, False: 0}
    end = time.monotonic() + seconds

    def work(seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < end:
            case = draw.randrange(len(examples)), draw.random() < 0.7
            try:
                answer = ask(client, examples[case[0]], case[1])
            except httpx.HTTPError as error:
                answer = repr(error)
            counts[case[1]] += 1
            if answer != wanted[case]:
                wrong.append([*case, answer, wanted[case]])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(CLIENTS)]
    for thread in threads:
        thread.start()
    while time.monotonic() < end:
        time.sleep(2)
        memory.append(resident(pid))
    for thread in threads:
        thread.join()
    return memory, wrong, counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    examples = list(generate_examples(QUESTIONS))
    store = tempfile.mkdtemp()
    engine = Engine.from_pretrained(args.model, store=store, dtype="float32", device="cpu")
    answers = engine.answer(examples, max_new_tokens=TOKENS)
    wanted = {(index, True): answer.text for index, answer in enumerate(answers)}
    del engine
    command = [sys.executable, "-m", "blocktune.cli", "vllm", "serve", args.model]
    command += ["--store", store, "--port", str(PORT), *OPTIONS]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        client = httpx.Client(base_url=f"http://127.0.0.1:{PORT}", timeout=300)
        while True:
            assert server.poll() is None, "the server has stopped"
            try:
                client.get("/health").raise_for_status()
                break
            except httpx.HTTPError:
                time.sleep(0.5)
        for index, example in enumerate(examples):
            wanted[index, False] = ask(client, example, False)
        memory, wrong, counts = load(client, examples, wanted, 60 * args.minutes, server.pid)
    finally:
        server.terminate()
        server.wait()
    half = len(memory) // 2
    third, fourth = (
        statistics.median(memory[half : half + half // 2]),
        statistics.median(memory[-half // 2 :]),
    )
    growth = fourth / third - 1
    record = {"minutes": args.minutes, "clients": CLIENTS, "with_documents": counts[True]}
    record |= {"without": counts[False], "wrong": wrong[:20], "memory_growth": growth}
    record |= {"memory_mb": [size >> 20 for size in memory], "provenance": provenance()}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps({key: record[key] for key in list(record)[:6]}))
    return int(bool(wrong) or growth > 0.05)


if __name__ == "__main__":
    sys.exit(main())
