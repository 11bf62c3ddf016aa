"""Measures the CPU time of a request with cached chunks, without the model and data transfer.

    python eval/server/overhead.py data/tiny --output eval/results/server/overhead.json

The application runs in this process and is called as uvicorn calls it, with streamed chat requests
whose chunks are all in memory. All clocks count the CPU time of one thread, so the numbers also
hold on a busy machine. Up to the first piece of the answer, the overhead is the sum of

- ``http``: the thread of the event loop, from the first byte of the request to that piece;
- ``front``: the thread that prepares the job: JSON, messages, tokens, layout;
- ``engine``: the engine's thread up to the first token, without loading, encoding, relocating and
  selecting chunks, recomputing tokens and sampling the first token.

``after`` is the engine's work after the first token, such as statistics and freeing keys and
values. Sockets are not included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from load import BYTES_AND_MODEL
from traffic import CHAT, Ask, corpus, machine, zipf

from blocktune.engine import Engine
from blocktune.prompt import Chunk
from blocktune.server import ServerConfig, Service, create_app
from blocktune.server.job import Delta


class Meter:
    """Sends requests to an application and reads the CPU clocks of its threads."""

    def __init__(self, service: Service):
        self.service, self.app = service, create_app(service)
        self.seconds: dict[str, float] = {}
        self._to_thread, asyncio.to_thread = asyncio.to_thread, self._front

    async def _front(self, function: Callable, *args: Any) -> Any:
        def timed() -> Any:
            started = time.thread_time()
            try:
                return function(*args)
            finally:
                self.seconds["front"] = time.thread_time() - started

        return await self._to_thread(timed)

    def _engine(self) -> float:
        return time.clock_gettime(time.pthread_getcpuclockid(self.service.scheduler._thread.ident))

    async def measure(self, body: bytes) -> dict[str, float]:
        """CPU seconds of one request by part; the engine must be idle before and after."""
        original, first, received = self.service.scheduler.submit, [], bytearray()

        def submit(job: Any) -> None:
            emit = job.emit

            def timed(event: Any) -> None:
                if isinstance(event, Delta) and not first:
                    first.append(time.thread_time())
                emit(event)

            job.emit = timed
            original(job)

        self.service.scheduler.submit = submit
        pending = [{"type": "http.request", "body": body, "more_body": False}]
        loop_began, engine_began, loop_ended = time.thread_time(), self._engine(), []

        async def receive() -> dict[str, Any]:
            return pending.pop() if pending else await asyncio.Event().wait()

        async def send(message: dict[str, Any]) -> None:
            received.extend(message.get("body", b""))
            if message.get("body") and not loop_ended:
                loop_ended.append(time.thread_time())

        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": CHAT}
        scope |= {"headers": [(b"content-type", b"application/json")], "query_string": b""}
        await self.app(scope, receive, send)
        self.service.scheduler.submit = original
        await asyncio.sleep(0.1)
        lines = received.decode().split("\n\n")
        events = [json.loads(line[6:]) for line in lines if line[6:7] == "{"]
        ttft = events[-1]["blocktune"]["ttft"]
        self.seconds["http"] = loop_ended[0] - loop_began
        whole = first[0] - engine_began
        self.seconds["engine"] = whole - sum(ttft[name] for name in BYTES_AND_MODEL)
        self.seconds["after"] = self._engine() - first[0]
        self.seconds["model_and_bytes"] = whole - self.seconds["engine"]
        cached = events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]
        return self.seconds | {"tokens": events[-1]["usage"]["prompt_tokens"], "cached": cached}


async def run(service: Service, asks: list[Ask], args: argparse.Namespace) -> list[dict]:
    meter = Meter(service)
    service.scheduler.start()
    bodies = [json.dumps(ask.body(1, args.method)).encode() for ask in asks]
    times = [await meter.measure(body) for body in (bodies * args.requests)[: args.requests + 8]]
    await asyncio.to_thread(service.scheduler.stop)
    return times[8:]  # without warm-up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--method", default="naive")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    time.perf_counter = time.thread_time  # so that the engine also reports CPU time
    documents = corpus(args.model, 1 + args.tokens // args.chunk_tokens, args.chunk_tokens)
    engine = Engine.from_pretrained(args.model)
    engine.encode([Chunk(text, title) for title, text in documents])
    service = Service({"model": engine}, ServerConfig(), checked=False)
    times = asyncio.run(run(service, zipf(documents, 8, len(documents), 0.0), args))
    report: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "machine": machine()}
    report |= {name: statistics.median(request[name] for request in times) for name in times[0]}
    overhead = [request["http"] + request["front"] + request["engine"] for request in times]
    q25, median, q75 = statistics.quantiles(overhead, n=4)
    report |= {"overhead_s": median, "quartiles_s": [q25, q75]}
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
