"""Load test of our server with reuse, with full prefill, and of `transformers serve`.

    python eval/server/load.py data/tiny --output eval/results/server/load_tiny.json
    python eval/server/load.py MODEL --requests 24 --output eval/results/server/load_smollm2.json

The chunks of the requests recur by a Zipf law. First one client asks, which measures latency, then
several, which measure throughput. The servers run one after the other on the same requests. Ours
starts with an empty cache, unless ``--ahead`` encodes the corpus first.
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
"""Options for ``transformers serve``: prefill of a 4k prompt in one step, and a cache for five."""


def measure(side: str, asks: list[Ask], args: argparse.Namespace, log: Path) -> dict[str, Any]:
    """Measures one server in all phases; ``side`` is a method of our server, or `PEER`."""
    port, ours = free_port(), side != PEER
    if ours:
        command = blocktune_command(args.model, port, "--limit", "queue=1024")
    else:
        command = [sys.executable, "-m", "transformers.cli.transformers", "serve", args.model]
        command += ["--continuous-batching", "--device", "cpu", "--port", str(port)]
        command += ["--dtype", "auto", *args.peer.split()]
    bodies = [ask.body(args.tokens, side if ours else None) for ask in asks]
    if not ours:
        bodies = [body | {"model": args.model} for body in bodies]
    half = len(bodies) // 2
    with server(command, port, log) as (url, _):
        warm = Ask("Who?", (("Warm", "Up. " * 20),))
        body = warm.body(2, side if ours else None) | ({} if ours else {"model": args.model})
        if error := ask_all(url, [body], 1)[0][0].error:
            return {"side": side, "error": error}
        if ours and args.ahead and side != FULL:
            documents = dict.fromkeys(doc for ask in asks for doc in ask.documents)
            encode(url, list(documents))
        alone, _ = ask_all(url, bodies[:half], 1)
        together, seconds = ask_all(url, bodies[half:], args.clients)
    errors = [answer.error for answer in (*alone, *together) if answer.error]
    if errors:
        return {"side": side, "error": errors[0], "failed": len(errors)}
    numbers = {
        "side": side,
        "requests": len(asks),
        "ttft_s": statistics.median(answer.ttft_s for answer in alone),
        "ttft_p90_s": statistics.quantiles((answer.ttft_s for answer in alone), n=10)[-1],
        "itl_s": median_gap(alone),
        "together_ttft_s": statistics.median(answer.ttft_s for answer in together),
        "together_itl_s": median_gap(together),
        "requests_per_s": len(together) / seconds,
    }
    return numbers | (own_numbers(alone) if ours else {})


def median_gap(answers: list[Timed]) -> float | None:
    """Median inter-token latency in seconds."""
    gaps = [gap for answer in answers for gap in answer.gaps_s]
    return statistics.median(gaps) if gaps else None


def own_numbers(answers: list[Timed]) -> dict[str, Any]:
    """Hit rate, and overhead: time to first token without model computation and data transfer."""
    chunks = [chunk for answer in answers for chunk in answer.own["chunks"]]
    parts = [sum(answer.own["ttft"][name] for name in BYTES_AND_MODEL) for answer in answers]
    overhead = [answer.ttft_s - part for answer, part in zip(answers, parts, strict=True)]
    return {
        "hit_rate": sum(c.get("cached") not in (None, "none") for c in chunks) / len(chunks),
        "prompt_tokens": statistics.mean(a.own["usage"]["prompt_tokens"] for a in answers),
        "overhead_s": statistics.median(overhead),
    }


def encode(url: str, documents: list[tuple[str, str]]) -> None:
    """Encodes the corpus before the first request."""
    for start in range(0, len(documents), 32):
        part = [{"title": title, "text": text} for title, text in documents[start : start + 32]]
        httpx.post(f"{url}/v1/chunks", json={"documents": part}, timeout=3600).raise_for_status()


def ratios(own: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Our numbers divided by another server's: lower is better for times, higher for throughput."""
    names = ("ttft_s", "itl_s", "together_ttft_s", "together_itl_s", "requests_per_s")
    return {name: own[name] / other[name] for name in names if own.get(name) and other.get(name)}


def table(sides: list[dict[str, Any]]) -> str:
    """The results as a Markdown table."""
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
    parser.add_argument("--requests", type=int, default=48, help="half from one client")
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--documents", type=int, default=64)
    parser.add_argument("--chunks", type=int, default=8, help="chunks per request")
    parser.add_argument("--chunk-tokens", type=int, default=512)
    parser.add_argument("--power", type=float, default=1.2)
    parser.add_argument("--tokens", type=int, default=16, help="largest number per answer")
    parser.add_argument("--ahead", action="store_true", help="encode the corpus before asking")
    parser.add_argument("--peer", default=ROOM, help="options of transformers serve")
    parser.add_argument("--peer-requests", type=int, help="requests for it; 0: do not run it")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    args.method = args.method or ["naive"]
    args.output.parent.mkdir(parents=True, exist_ok=True)
    log = Path(tempfile.mkdtemp()) / "servers.log"
    report: dict[str, Any] = {"command": " ".join(["python", *sys.argv]), "machine": machine()}
    documents = corpus(args.model, args.documents, args.chunk_tokens)
    asks = zipf(documents, args.requests, args.chunks, args.power)
    sides = [measure(method, asks, args, log) for method in (*args.method, FULL)]
    if args.peer_requests != 0:
        sides.append(measure(PEER, asks[: args.peer_requests], args, log))
    report |= {"sides": sides, "ratios": {}}
    for own in sides[: len(args.method)]:
        others = sides[len(args.method) :]
        report["ratios"][own["side"]] = {other["side"]: ratios(own, other) for other in others}
    args.output.write_text(json.dumps(report, indent=1) + "\n")
    print(table(sides))
    print(json.dumps(report["ratios"], indent=1))


if __name__ == "__main__":
    main()
