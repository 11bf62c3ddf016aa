"""Hostile requests against a running server: none may fail it, and the next good one is answered.

    blocktune serve -m data/tiny --port 8137
    python eval/server/hostile.py --url http://127.0.0.1:8137 --requests 10000 --pid PID

Generated from the OpenAPI schema (schemathesis), made by hand, and sockets that send half a request
or read nothing. Prints one JSON line: statuses, memory and open files before and after (of
``--pid``), and what went wrong. The exit code is 1 if anything did.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import random
import socket
import sys
import time
import urllib.parse

import httpx
import psutil
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis.generation import GenerationMode

CHAT = "/v1/chat/completions"
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
    *("{a: b}", "naive + deviation 100 %", "prompt-cache-schema slot=1", "p+s+r", "sel", "psr"),
]
FIELDS = [
    *("messages", "documents", "temperature", "top_p", "top_k", "n", "seed", "stop", "max_tokens"),
    *("cache_salt", "blocktune", "stream", "model", "logprobs", "top_logprobs", "tools", "user"),
]
RAW = [
    *(b"", b"{", b"null", b"[" * 200_000, b'{"a":' * 50_000, b"\xff\xfe\x00", b"9" * 100_000),
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "a"}], "top_p": Infinity}',
    b'{"messages": [{"role": "user", "content": "a"}], "documents": [' + b'"a",' * 10**6 + b'"a"]}',
]


class Run:
    """Sends requests and counts what came back."""

    def __init__(self, url: str):
        self.client = httpx.Client(base_url=url, timeout=120)
        self.url = urllib.parse.urlsplit(url)
        self.statuses: collections.Counter = collections.Counter()
        self.wrong: list[str] = []

    @property
    def count(self) -> int:
        return sum(self.statuses.values())

    def send(self, method: str, path: str, **arguments) -> None:
        response = self.client.request(method, path, **arguments)
        self.statuses[response.status_code] += 1
        if response.status_code >= 500:
            told = repr(arguments)[:300]
            self.wrong.append(f"{response.status_code} {method} {path} {told} {response.text}")

    def good(self) -> None:
        response = self.client.post(CHAT, json=GOOD)
        if response.status_code != 200:
            self.wrong.append(f"a good request was answered {response.status_code}")

    def by_hand(self, rng: random.Random) -> None:
        """One request with one or two fields that are wrong, or a body that is no request."""
        kind = rng.random()
        headers = {"content-type": "application/json"}
        if kind < 0.05:
            self.send("POST", CHAT, content=rng.choice(RAW), headers=headers)
            return
        if kind < 0.15:
            key = rng.choice(["..%2f..%2fetc", "0" * 64, "f" * 81, "a-b", "%00", "x" * 5000])
            self.send(rng.choice(["GET", "DELETE", "PUT"]), f"/v1/chunks/{key}")
            return
        body = dict(GOOD)
        if kind < 0.45:
            body["blocktune"] = {"method": rng.choice(METHODS), "strip": True}
            body["documents"] = [rng.choice(["a", "b c", "d " * 300]) for _ in range(3)]
        else:
            for name in rng.sample(FIELDS, rng.choice([1, 2])):
                body[name] = rng.choice(VALUES)
        self.send("POST", CHAT, content=json.dumps(body).encode(), headers=headers)

    def half_closed(self, rng: random.Random) -> None:
        """A socket that sends part of a request, or all of it, and then does not read."""
        body = json.dumps(GOOD | {"stream": True, "max_tokens": 64}).encode()
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        whole = f"{head}content-length: {len(body)}\r\n\r\n".encode() + body
        with socket.create_connection((self.url.hostname, self.url.port), timeout=10) as sock:
            sock.sendall(whole[: rng.randrange(1, len(whole) + 1)])
            if rng.random() < 0.5:
                sock.shutdown(socket.SHUT_WR)


def generated(run: Run, until: int) -> None:
    """Requests from the schema, until so many were sent."""
    schema = schemathesis.openapi.from_dict(run.client.get("/openapi.json").json())
    operations = [found.ok() for found in schema.get_all_operations()]

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
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    run, rng, server = Run(asked.url), random.Random(asked.seed), psutil.Process(asked.pid)
    for _ in range(20):
        run.good()
    before, started = held(server), time.time()
    while run.count < asked.requests // 2:
        run.by_hand(rng)
        if run.count % 50 == 0:
            run.half_closed(rng)
            run.good()
    middle = held(server)
    generated(run, asked.requests)
    time.sleep(3)
    run.good()
    made = {
        "requests": run.count,
        "seconds": round(time.time() - started, 1),
        "statuses": dict(sorted(run.statuses.items())),
        "before": before,
        "middle": middle,
        "after": held(server),
        "wrong": run.wrong[:20],
    }
    print(json.dumps(made, ensure_ascii=True))
    return bool(run.wrong)


def held(server: psutil.Process) -> dict[str, float]:
    """Memory, open files and sockets of the server."""
    return {
        "rss_mb": round(server.memory_info().rss / 1e6, 1),
        "files": server.num_fds(),
        "threads": server.num_threads(),
    }


if __name__ == "__main__":
    sys.exit(main())
