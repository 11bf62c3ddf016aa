"""Sends hostile requests to a server, which must not crash and must still answer good requests.

    python eval/server/hostile.py data/tiny --output eval/results/server/hostile.json

The requests are generated from the OpenAPI schema (schemathesis) or hand-written, or are large and
come from 16 clients at once; other sockets send incomplete requests, send byte by byte, or never
read. All come from one tenant. Another tenant has chunks in the same store, which must not be
found. The server's caches (chunks, exact prefixes, token ids of recent texts) are filled first, so
that later growth is a leak. Writes the response statuses, the server's memory and open files over
time, and all failures. The exit code is 1 on a failure, or if the memory grows by more than 5 %
after the first eighth.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import socket
import sys
import tempfile
import time
import urllib.parse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode
from traffic import blocktune_command, free_port, machine, server

CHAT = "/v1/chat/completions"
OURS, THEIRS = "key-of-the-hostile-one", "key-of-somebody-else"
SECRET = ["The password of the harbour is Frozen Shore.", "It was changed on Monday."]
GOOD = {
    "messages": [{"role": "user", "content": "Where is Anna Belt?"}],
    "documents": ["Anna Belt is in Kirby."],
    "temperature": 0,
    "max_tokens": 8,
}
VALUES = [
    *(None, True, -1, 0, 1 << 31, 1 << 63, 1 << 70, 1e308, "", " ", "\x00", "\ud800", "a" * 10_000),
    *([], {}, [[]], [None] * 100, {"a": {"b": {"c": []}}}, "../../etc/passwd", "%2e%2e%2f"),
    *("<s></s><|user|>", "\u202e\u0000\ufeff", "BlocktuneChunksStandHere", "naive + + epic"),
]
METHODS = [
    *("epic 0", "epic 1e9", "link0 64", "cacheclip auxiliary=/tmp", "random 100 %", "naive + x"),
    *("naive + layout slot=1 placement=reserved", "ape", "oracle", "no-context", "cacheblend 0 %"),
    *("{a: b}", "naive + deviation 100 %", "prompt-cache-schema slot=1", "sel", "psr"),
]
FIELDS = [
    *("messages", "documents", "temperature", "top_p", "top_k", "n", "seed", "stop", "max_tokens"),
    *("cache_salt", "blocktune", "stream", "model", "logprobs", "top_logprobs", "tools", "user"),
    *("prompt", "pin", "echo", "best_of", "response_format", "stream_options", "logit_bias"),
]
PATHS = [*([CHAT] * 6), "/v1/completions", "/v1/chunks"]
HEADERS = [
    {"content-type": "text/plain"},
    {"content-type": "application/json; charset=utf-16"},
    {"authorization": "Bearer " + "\xff" * 100},
    {"authorization": f"Bearer {OURS} {THEIRS}"},
    {"content-encoding": "gzip"},
    {"host": "evil.example"},
    {"x-long": "a" * 60_000},
    {"expect": "100-continue"},
]
SOCKETS = [
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
    b"GET " + b"/" * 70_000 + b" HTTP/1.1\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: -5\r\n\r\n",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999999\r\n\r\n{",
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n",
    b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 5000,
    b"\r\n" * 1000,
]
RAW = [
    *(b"", b"{", b"null", b"[" * 200_000, b'{"a":' * 50_000, b"\xff\xfe\x00", b"9" * 100_000),
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "a"}], "top_p": Infinity}',
    b'{"messages": [{"role": "user", "content": "a"}], "documents": [' + b'"a",' * 10**6 + b'"a"]}',
    b'{"messages": [{"role": "user", "content": "a"}], "x": [' + b"[]," * 2_600_000 + b"1]}",
    b'{"messages": [{"role": "user", "content": "a"}], "x": [' + b'{"a":1},' * 900_000 + b"1]}",
    b'{"messages": [{"role": "user", "content": "a"}], "stop": "' + b"a" * 7_000_000 + b'"}',
    b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "'
    + b"a b " * 900_000
    + b'"}]}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "documents": ['
    + b",".join(b'{"wrong": %d}' % index for index in range(4096))
    + b"]}",
]


class Run:
    """Sends requests, counts response statuses and collects failures."""

    def __init__(self, url: str):
        headers = {"authorization": f"Bearer {OURS}"}
        self.client = httpx.Client(base_url=url, timeout=120, headers=headers)
        self.url = urllib.parse.urlsplit(url)
        self.statuses: collections.Counter = collections.Counter()
        self.wrong: list[str] = []
        self.slow: list[socket.socket] = []

    @property
    def count(self) -> int:
        return sum(self.statuses.values())

    def send(self, method: str, path: str, **arguments) -> None:
        try:
            response = self.client.request(method, path, **arguments)
        except (httpx.LocalProtocolError, UnicodeError):
            return  # httpx refuses to send it
        except httpx.HTTPError as error:
            self.wrong.append(f"{method} {path} {arguments!r:.300}: {error!r}")
            return
        self.statuses[response.status_code] += 1
        if response.status_code >= 500:
            sent = repr(arguments)[:300]
            self.wrong.append(f"{response.status_code} {method} {path} {sent} {response.text}")

    def good(self) -> None:
        response = self.client.post(CHAT, json=GOOD)
        if response.status_code != 200:
            self.wrong.append(f"a valid request was answered with status {response.status_code}")

    def fill(self, rng: random.Random) -> None:
        """Fills the server's caches with requests that share no words."""
        for _ in range(40):
            words = " ".join(f"{rng.getrandbits(40):x}" for _ in range(3000))
            long = {"prompt": words * 3, "max_tokens": 1}  # refused, but only after tokenisation
            self.client.post("/v1/completions", json=long)
            body = {"documents": [words[at : at + 700] for at in range(0, 16 * 700, 700)]}
            self.client.post("/v1/chunks", json=body)
            body = {"prompt": words[:4000], "max_tokens": 1}
            self.client.post("/v1/completions", json=body)

    def by_hand(self, rng: random.Random) -> None:
        """Sends a request with one or two wrong fields, or a body that is not a request."""
        kind = rng.random()
        headers = {"content-type": "application/json"}
        if kind < 0.05:
            self.send("POST", CHAT, content=rng.choice(RAW), headers=headers)
            return
        if kind < 0.15:
            key = rng.choice(["..%2f..%2fetc", "0" * 64, "f" * 81, "a-b", "%00", "x" * 5000])
            self.send(rng.choice(["GET", "DELETE", "PUT"]), f"/v1/chunks/{key}")
            return
        path, body = rng.choice(PATHS), dict(GOOD)
        if path == "/v1/completions":
            body["prompt"] = body.pop("messages")[0]["content"]
        elif path == "/v1/chunks":
            body = {"documents": body["documents"], "pin": rng.random() < 0.5}
        if kind < 0.2:
            headers |= rng.choice(HEADERS)
        elif kind < 0.45:
            body["blocktune"] = {"method": rng.choice(METHODS), "strip": True}
            body["documents"] = [rng.choice(["a", "b c", "d " * 300]) for _ in range(3)]
        else:
            for name in rng.sample(FIELDS, rng.choice([1, 2])):
                body[name] = rng.choice(VALUES)
        self.send("POST", path, content=json.dumps(body).encode(), headers=headers)

    def at_once(self) -> None:
        """Sends large bodies from many clients at the same time."""
        headers = {"content-type": "application/json"}
        bodies = [body for body in RAW if len(body) > 1 << 20] * 8
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(lambda b: self.send("POST", CHAT, content=b, headers=headers), bodies))

    def sockets(self, rng: random.Random) -> None:
        """Opens a socket that sends part of a request, one that sends no HTTP, and slow ones."""
        body = json.dumps(GOOD | {"stream": True, "max_tokens": 64}).encode()
        head = (
            f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {OURS}\r\n"
            "content-type: application/json\r\n"
        )
        whole = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        with self._connect() as sock:
            sock.sendall(whole[: rng.randrange(1, len(whole) + 1)])
            if rng.random() < 0.5:
                sock.shutdown(socket.SHUT_WR)
        with self._connect() as sock, contextlib.suppress(OSError):
            sock.sendall(rng.choice(SOCKETS))
            sock.settimeout(0.2)
            sock.recv(100)
        if len(self.slow) < 50:
            self.slow.append(self._connect())
        for sock in self.slow:  # send one byte of a header at a time and never finish
            with contextlib.suppress(OSError):
                sock.sendall(b"G")

    def _connect(self) -> socket.socket:
        return socket.create_connection((self.url.hostname, self.url.port), timeout=10)

    def theirs(self) -> None:
        """Checks that chunks of another tenant are neither found nor shown."""
        owner = {"authorization": f"Bearer {THEIRS}"}
        documents = [f"{text} {time.time()}" for text in SECRET]
        body = {"documents": documents, "pin": True}
        stored = self.client.post("/v1/chunks", json=body, headers=owner).json()
        for chunk in stored["data"]:
            if self.client.get(f"/v1/chunks/{chunk['key']}").status_code != 404:
                self.wrong.append("a key of another tenant was accepted")
        for salt in ({}, {"cache_salt": f"{time.time()}"}):
            answer = self.client.post(CHAT, json=GOOD | {"documents": documents} | salt).json()
            cached = [chunk["cached"] for chunk in answer["blocktune"]["chunks"]]
            if cached != ["none"] * len(SECRET):
                self.wrong.append(f"chunks of another tenant were found: {cached}")


def generated(run: Run, until: int) -> None:
    """Sends requests generated from the schema, until ``until`` were answered in all."""
    schema = schemathesis.openapi.from_dict(run.client.get("/openapi.json").json())
    operations = [operation.ok() for operation in schema.get_all_operations()]

    def send(case) -> None:
        arguments = case.as_transport_kwargs(base_url="http://localhost")
        method = arguments.pop("method")
        arguments = {k: v for k, v in arguments.items() if k not in ("url", "cookies")}
        run.send(method, case.formatted_path, **arguments)

    seed = 0
    while run.count < until:
        for operation in operations:
            for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
                seed += 1
                quick = settings(
                    max_examples=50,
                    deadline=None,
                    database=None,
                    suppress_health_check=list(HealthCheck),
                    phases=[Phase.explicit, Phase.generate],
                )
                with contextlib.suppress(Unsatisfiable):  # a route without parameters
                    quick(given(case=operation.as_strategy(generation_mode=mode))(send))()
            run.good()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        tenants, log = Path(folder, "tenants.yaml"), Path(folder, "server.log")
        tenants.write_text(f"ours: {{key: {OURS}}}\ntheirs: {{key: {THEIRS}}}\n")
        port = free_port()
        options = ["--tenants", str(tenants), "--store", f"{folder}/store", "--store-gb", "0.05"]
        options += ["--limit", "body_s=3", "--limit", "request_s=60"]
        with server(blocktune_command(args.model, port, *options), port, log) as (url, process):
            report = attack(Run(url), psutil.Process(process.pid), args)
        lines = log.read_text().splitlines()
        failed = [i for i, line in enumerate(lines) if line.startswith("Traceback")]
        report["tracebacks"] = len(failed)
        report["first_traceback"] = lines[failed[0] - 2 : failed[0] + 60] if failed else []
        report["texts_in_log"] = sum("password of the harbour" in line for line in lines)
    args.output.write_text(json.dumps(report, indent=1, ensure_ascii=True) + "\n")
    print(json.dumps(report, ensure_ascii=True))
    return bool(report["wrong"] or report["tracebacks"] or report["texts_in_log"])


def attack(run: Run, server: psutil.Process, args: argparse.Namespace) -> dict[str, object]:
    """Runs all attacks and reports the server's resources over time and all failures."""
    rng = random.Random(args.seed)
    for _ in range(20):
        run.good()
    run.fill(rng)
    run.theirs()
    begin, started = resources(server), time.time()
    by_hand = [begin]
    while run.count < args.requests // 2:
        run.by_hand(rng)
        if run.count % 50 == 0:
            run.sockets(rng)
            run.good()
        if run.count >= len(by_hand) * args.requests // 8:
            by_hand.append(resources(server))
    run.at_once()
    generated(run, args.requests)
    for sock in run.slow:
        sock.close()
    run.theirs()
    time.sleep(7)
    run.good()
    memory = [*by_hand, resources(server)]
    growth = memory[-1]["rss_mb"] / memory[1]["rss_mb"] - 1
    if growth > 0.05:
        run.wrong.append(f"the memory grew by {growth:.1%}")
    return {
        "command": " ".join(["python", *sys.argv]),
        "machine": machine(),
        "requests": run.count,
        "seconds": round(time.time() - started, 1),
        "statuses": dict(sorted(run.statuses.items())),
        "held": memory,
        "growth": round(growth, 4),
        "wrong": run.wrong[:20],
    }


def resources(server: psutil.Process) -> dict[str, float]:
    """Memory, open files and threads of the server after it has been idle for a while."""
    time.sleep(3)
    return {
        "rss_mb": round(server.memory_info().rss / 1e6, 1),
        "files": server.num_fds(),
        "threads": server.num_threads(),
    }


if __name__ == "__main__":
    sys.exit(main())
