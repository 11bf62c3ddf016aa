"""Load on our server, on its own full prefill and on `transformers serve`, in one run.

    python eval/server/load.py data/tiny --output eval/results/server/load_tiny.json
    python eval/server/load.py MODEL --requests 24 --output eval/results/server/load_smollm2.json

The chunks of the requests recur by a Zipf law. First one client asks, then several: the first says
what an answer takes, the second how many a second there are. The servers run one after the other,
on the same requests; ours starts with an empty cache, unless ``--ahead`` encodes the corpus first.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import httpx
from traffic import (
    Ask,
    Timed,
    ask_all,
    blocktune_command,
    corpus,
    free_port,
    machine,
    server,
    zipf,
)

BYTES_AND_MODEL = ("load_s", "encode_s", "relocate_s", "select_s", "recompute_s", "first_token_s")
FULL, PEER = "full-prefill", "transformers serve"
ROOM = "--cb-num-blocks 96 --cb-max-batch-tokens 4608"
"""A whole prompt of 4k tokens in one step, and five of them in the cache (pages of 256 tokens)."""


def measure(side: str, asks: list[Ask], asked: argparse.Namespace, log: Path) -> dict[str, Any]:
    """All phases of one server; ``side`` is a method of ours, or `PEER`."""
    port, ours = free_port(), side != PEER
    if ours:
        command = blocktune_command(asked.model, port, "--limit", "queue=1024")
    else:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", asked.model]
        command += ["--continuous-batching", "--device", "cpu", "--port", str(port)]
        command += ["--dtype", "auto", *asked.peer.split()]
    bodies = [one.body(asked.tokens, side if ours else None) for one in asks]
    if not ours:
        bodies = [body | {"model": asked.model} for body in bodies]
    half = len(bodies) // 2
    with server(command, port, log) as (url, _):
        warm = Ask("Who?", (("Warm", "Up. " * 20),))
        body = warm.body(2, side if ours else None) | ({} if ours else {"model": asked.model})
        if error := ask_all(url, [body], 1)[0][0].error:
            return {"side": side, "error": error}
        if ours and asked.ahead and side != FULL:
            documents = dict.fromkeys(doc for one in asks for doc in one.documents)
            encode(url, list(documents))
        alone, _ = ask_all(url, bodies[:half], 1)
        together, seconds = ask_all(url, bodies[half:], asked.clients)
    wrong = [one.error for one in (*alone, *together) if one.error]
    if wrong:
        return {"side": side, "error": wrong[0], "failed": len(wrong)}
    made = {
        "side": side,
        "requests": len(asks),
        "ttft_s": statistics.median(one.ttft_s for one in alone),
        "ttft_p90_s": statistics.quantiles((one.ttft_s for one in alone), n=10)[-1],
        "itl_s": median_gap(alone),
        "together_ttft_s": statistics.median(one.ttft_s for one in together),
        "together_itl_s": median_gap(together),
        "requests_per_s": len(together) / seconds,
    }
    return made | (own_numbers(alone) if ours else {})


def median_gap(made: list[Timed]) -> float | None:
    """Seconds between two tokens."""
    gaps = [gap for one in made for gap in one.gaps_s]
    return statistics.median(gaps) if gaps else None


def own_numbers(made: list[Timed]) -> dict[str, Any]:
    """Hits, and the overhead: what a client waits for beside the model and the bytes."""
    chunks = [chunk for one in made for chunk in one.own["chunks"]]
    parts = [sum(one.own["ttft"][name] for name in BYTES_AND_MODEL) for one in made]
    overhead = [one.ttft_s - part for one, part in zip(made, parts, strict=True)]
    return {
        "hit_rate": sum(c.get("cached") not in (None, "none") for c in chunks) / len(chunks),
        "prompt_tokens": statistics.mean(one.own["usage"]["prompt_tokens"] for one in made),
        "overhead_s": statistics.median(overhead),
    }


def encode(url: str, documents: list[tuple[str, str]]) -> None:
    """Encodes the corpus ahead."""
    for start in range(0, len(documents), 32):
        part = [{"title": title, "text": text} for title, text in documents[start : start + 32]]
        httpx.post(f"{url}/v1/chunks", json={"documents": part}, timeout=3600).raise_for_status()


def ratios(own: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Ours by the other's: below 1 is better for times, above 1 for requests a second."""
    names = ("ttft_s", "itl_s", "together_ttft_s", "together_itl_s", "requests_per_s")
    return {name: own[name] / other[name] for name in names if own.get(name) and other.get(name)}


def table(sides: list[dict[str, Any]]) -> str:
    """In Markdown."""
    names = ("ttft_s", "itl_s", "together_ttft_s", "together_itl_s", "requests_per_s", "hit_rate")
    rows = [f"| side | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for side in sides:
        cells = [f"{side[n]:.4f}" if side.get(n) is not None else "" for n in names]
        rows.append(f"| {side['side']} | {side.get('error') or ' | '.join(cells)} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--method", action="append", help="repeatable; default: naive")
    parser.add_argument("--requests", type=int, default=48, help="half by one client, half by all")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=8, help="of a request")
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--power", type=float, default=1.2)
    parser.add_argument("--tokens", type=int, default=16, help="of an answer at most")
    parser.add_argument("--ahead", action="store_true", help="encode the corpus before asking")
    parser.add_argument("--peer", default=ROOM, help="options of transformers serve")
    parser.add_argument("--peer-requests", type=int, help="the first so many; 0: without it")
    parser.add_argument("--output", type=Path, required=True)
    asked = parser.parse_args()
    asked.method = asked.method or ["naive"]
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    log = Path(tempfile.mkdtemp()) / "servers.log"
    made: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "machine": machine()}
    documents = corpus(asked.model, asked.documents, asked.chunk_tokens)
    asks = zipf(documents, asked.requests, asked.chunks, asked.power)
    sides = [measure(one, asks, asked, log) for one in (*asked.method, FULL)]
    if asked.peer_requests != 0:
        sides.append(measure(PEER, asks[: asked.peer_requests], asked, log))
    made |= {"sides": sides, "ratios": {}}
    for own in sides[: len(asked.method)]:
        others = sides[len(asked.method) :]
        made["ratios"][own["side"]] = {other["side"]: ratios(own, other) for other in others}
    asked.output.write_text(json.dumps(made, indent=1) + "\n")
    print(table(sides))
    print(json.dumps(made["ratios"], indent=1))


if __name__ == "__main__":
    main()
