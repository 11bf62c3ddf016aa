"""What a request of cached chunks costs beside the model and the bytes, in processor time.

    python eval/server/overhead.py data/tiny --output eval/results/server/overhead.json

The application runs in this process and is called as uvicorn calls it, with streamed chat requests
whose chunks are all in memory. Every clock counts the processor time of its thread, so the numbers
also hold on a busy machine. Up to the first piece of the answer, the overhead is the sum of

- ``http``: the event loop's thread, from the request's first byte to that piece;
- ``front``: the thread that makes the job: JSON, messages, tokens, layout;
- ``engine``: the engine's thread up to the first token, without what its account calls reading,
  encoding, moving and choosing chunks, computing tokens and picking the first.

``after`` is what the engine's thread does when the request has ended: it counts, and frees the
keys and values. Sockets are not in it.
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
    """Sends requests to an application and reads the clocks of its threads."""

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
        """Seconds of one request; the engine is idle before and after."""
        job_of, first, told = self.service.scheduler.submit, [], bytearray()

        def submit(job: Any) -> None:
            emit = job.emit

            def timed(event: Any) -> None:
                if isinstance(event, Delta) and not first:
                    first.append(time.thread_time())
                emit(event)

            job.emit = timed
            job_of(job)

        self.service.scheduler.submit = submit
        pending = [{"type": "http.request", "body": body, "more_body": False}]
        loop_began, engine_began, loop_ended = time.thread_time(), self._engine(), []

        async def receive() -> dict[str, Any]:
            return pending.pop() if pending else await asyncio.Event().wait()

        async def send(message: dict[str, Any]) -> None:
            told.extend(message.get("body", b""))
            if message.get("body") and not loop_ended:
                loop_ended.append(time.thread_time())

        scope = {"type": "http", "http_version": "1.1", "method": "POST", "path": CHAT}
        scope |= {"headers": [(b"content-type", b"application/json")], "query_string": b""}
        await self.app(scope, receive, send)
        self.service.scheduler.submit = job_of
        await asyncio.sleep(0.1)
        events = [json.loads(one[6:]) for one in told.decode().split("\n\n") if one[6:7] == "{"]
        ttft = events[-1]["blocktune"]["ttft"]
        self.seconds["http"] = loop_ended[0] - loop_began
        whole = first[0] - engine_began
        self.seconds["engine"] = whole - sum(ttft[name] for name in BYTES_AND_MODEL)
        self.seconds["after"] = self._engine() - first[0]
        self.seconds["model_and_bytes"] = whole - self.seconds["engine"]
        cached = events[-1]["usage"]["prompt_tokens_details"]["cached_tokens"]
        return self.seconds | {"tokens": events[-1]["usage"]["prompt_tokens"], "cached": cached}


async def run(service: Service, asks: list[Ask], asked: argparse.Namespace) -> list[dict]:
    meter = Meter(service)
    service.scheduler.start()
    bodies = [json.dumps(one.body(1, asked.method)).encode() for one in asks]
    made = [await meter.measure(body) for body in (bodies * asked.requests)[: asked.requests + 8]]
    await asyncio.to_thread(service.scheduler.stop)
    return made[8:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--tokens", type=int, default=16_000)
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--method", default="naive")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    time.perf_counter = time.thread_time  # in the whole process
    documents = corpus(asked.model, 1 + asked.tokens // asked.chunk_tokens, asked.chunk_tokens)
    engine = Engine.from_pretrained(asked.model)
    engine.encode([Chunk(text, title) for title, text in documents])
    service = Service({"model": engine}, ServerConfig(), checked=False)
    facts = asyncio.run(run(service, zipf(documents, 8, len(documents), 0.0), asked))
    made: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "machine": machine()}
    made |= {name: statistics.median(one[name] for one in facts) for name in facts[0]}
    whole = [one["http"] + one["front"] + one["engine"] for one in facts]
    quarters = statistics.quantiles(whole, n=4)
    made |= {"overhead_s": quarters[1], "quartiles_s": [quarters[0], quarters[2]]}
    asked.output.write_text(json.dumps(made, indent=1) + "\n")
    print(json.dumps(made, indent=1))


if __name__ == "__main__":
    main()
