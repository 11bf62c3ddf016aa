"""`blocktune replay` and `blocktune bench`: the speed of this machine, and what a store saves."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from blocktune.commands import options as opt
from blocktune.commands.application import command, new_group

if TYPE_CHECKING:
    from blocktune.tables import Table


@command(
    "replay",
    "blocktune replay trace.jsonl --budget 10GB --budget 50GB --output out/replay",
    "blocktune replay mooncake_trace.jsonl.gz --policy lru --policy gdsf --budget 100GB --json",
    "blocktune replay zipf --limit 10000   # drawn: chunks that recur among ever new ones",
    "Record a trace with `--store chunks/,trace=trace.jsonl`.",
)
def replay(
    trace: Annotated[
        str, typer.Argument(help="Of a store, Mooncake (JSONL) or Azure (CSV), also .gz; or zipf.")
    ],
    budget: Annotated[
        list[str] | None,
        Option(
            help="Bytes of the store, such as 10GB; repeatable. Default: 1 to 50 % of the trace."
        ),
    ] = None,
    policy: Annotated[
        list[str] | None, Option(help="lru, lfu, fifo or gdsf; repeatable. Default: all.")
    ] = None,
    limit: Annotated[int | None, Option(min=1, help="Use only the first N requests.")] = None,
    token_bytes: Annotated[int, Option(min=1, help="Bytes of a token, where unknown.")] = 131_072,
    token_us: Annotated[float, Option(min=0, help="Microseconds to encode one.")] = 100.0,
    output: Annotated[
        Path | None, opt.in_folder(help="Folder for replay.json, replay.png and break_even.png.")
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Play a trace against stores of several sizes and policies: hits and seconds saved."""
    from blocktune.bench import replay as played
    from blocktune.cache.config import parse_bytes
    from blocktune.cache.ledger import POLICIES
    from blocktune.files import replace_json
    from blocktune.provenance import provenance
    from blocktune.tables import Table

    costs = played.Costs(token_bytes=token_bytes, token_s=token_us / 1e6)
    requests = played.read_requests(trace, limit)
    touched = played.touched_bytes(requests, costs)
    shares = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    budgets = [parse_bytes(b) for b in budget or ()] or [int(touched * s) for s in shares]
    pairs = itertools.product(policy or POLICIES, budgets)
    outcomes = [played.replay(requests, most, name, costs) for name, most in pairs]
    found = {"trace": str(trace), "requests": len(requests), "touched_bytes": touched}
    found["outcomes"] = [outcome._asdict() for outcome in outcomes]
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        points = {share: played.break_even(share, costs=costs) for share in (0.0, 0.15)}
        found["provenance"] = provenance()
        found["break_even"] = {s: [p._asdict() for p in line] for s, line in points.items()}
        replace_json(output / "replay.json", found)
        played.plot_replay(outcomes, output / "replay.png")
        played.plot_break_even(points, output / "break_even.png")
    rows = []
    for o in outcomes:
        shares = f"{o.hit_rate:.1%}", f"{o.saved:.1%}"
        rows.append((o.policy, f"{o.budget / 1e9:,.2f}", *shares, f"{o.saved_s:.1f}"))
    line = f"{len(requests):,} requests ask for {touched / 1e9:,.1f} GB of different chunks"
    table = Table(("policy", "GB", "hits", "saved", "saved s"), rows, left=("policy",))
    opt.tell(as_json, found, line, table)


Tokens = Annotated[int, Option(min=2, help="Length of the prompt, in tokens.")]
ChunkTokens = Annotated[int, Option(min=1, help="Tokens per chunk.")]
Repeats = Annotated[int, Option(min=1, help="Rounds; medians are shown.")]
Folder = Annotated[
    Path | None, opt.in_folder(help="Folder for the chunks. Default: the system's temporary one.")
]
Output = Annotated[Path | None, opt.in_file(help="JSON file to write as well.")]
Tiny = Annotated[bool, Option("--tiny", help="A toy model and prompt, for a quick try.")]


group = new_group("bench", "Measure speed on this machine.")


@command("attention", "blocktune bench attention --json", of=group)
def attention(
    tokens: Tokens = 8192,
    chunk: ChunkTokens = 512,
    repeats: Repeats = 5,
    output: Output = None,
    as_json: opt.AsJson = False,
) -> None:
    """Time split attention, forward and backward, against full causal and dense-mask SDPA."""
    from blocktune.bench.attention import bench_attention

    _show(bench_attention(tokens, chunk, repeats), as_json, output)


@command(
    "reuse",
    "blocktune bench reuse --tokens 4096 --repeats 3 --output out/reuse.json",
    "blocktune bench reuse --tiny   # takes seconds",
    of=group,
)
def reuse(
    tokens: Tokens = 8192,
    chunk: ChunkTokens = 512,
    repeats: Repeats = 5,
    tiny: Tiny = False,
    output: Output = None,
    as_json: opt.AsJson = False,
) -> None:
    """Time cacheblend, epic and naive reuse of cached chunks against a full prefill."""
    from blocktune.bench.reuse import TINY, ReuseBench, bench_reuse

    setting = replace(TINY, repeats=repeats) if tiny else ReuseBench(tokens, chunk, repeats=repeats)
    _show(bench_reuse(setting), as_json, output)


@command(
    "ttft",
    "blocktune bench ttft --model data/tiny --tokens 512,1024 --picture out/ttft.png",
    "blocktune bench ttft --adapter out/block --repeats 5 --json",
    of=group,
)
def ttft(
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    tokens: Annotated[
        str, Option(metavar="N,N,...", help="Lengths of the prompt, question included.")
    ] = "512,1024,2048,4096,8192",
    chunk: ChunkTokens = 128,
    repeats: Repeats = 3,
    threads: Annotated[int, Option(min=1, help="Threads that PyTorch may use.")] = 2,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    picture: Annotated[
        Path | None, opt.in_file(help="PNG to draw: seconds against length.")
    ] = None,
    output: Output = None,
    as_json: opt.AsJson = False,
) -> None:
    """Time first tokens with all chunks cached, in parts beside their limits, and in full."""
    from blocktune.bench.ttft import bench_ttft, draw_ttft, table

    if not all(part.strip().isdecimal() for part in tokens.split(",")):
        raise ValueError(f"--tokens must be lengths such as 512,8192, got '{tokens}'")
    lengths = [int(part) for part in tokens.split(",")]
    engine = opt.load_engine(model, adapter, None, dtype, device)
    found = bench_ttft(engine, lengths, chunk=chunk, repeats=repeats, num_threads=threads)
    if picture is not None:
        draw_ttft(found, picture)
    _show(found, as_json, output, table)


@command(
    "store",
    "blocktune bench store --json",
    "blocktune bench store --folder /mnt/nvme --output out/store.json",
    of=group,
)
def store(
    tokens: Tokens = 8192,
    chunk: ChunkTokens = 512,
    repeats: Repeats = 5,
    keys: Annotated[int, Option(min=1, help="Keys in the index for look-ups.")] = 1_000_000,
    folder: Folder = None,
    tiny: Tiny = False,
    output: Output = None,
    as_json: opt.AsJson = False,
) -> None:
    """Time loading cached chunks from disk and memory against copying; look-ups; codecs."""
    from blocktune.bench.store import QUICK, STORE, bench_store

    setting = QUICK if tiny else replace(STORE, tokens=tokens, chunk=chunk, repeats=repeats)
    _show(bench_store(setting, folder, min(keys, 1000) if tiny else keys), as_json, output)


@command(
    "vllm",
    "blocktune bench vllm --json   # in an environment with vLLM",
    "blocktune bench vllm --tiny",
    of=group,
)
def vllm(tiny: Tiny = False, output: Output = None, as_json: opt.AsJson = False) -> None:
    """Time first tokens from cached chunks on vLLM against its prefill and prefix cache."""
    from blocktune.bench.vllm import TINY, VllmBench, bench_vllm

    _show(bench_vllm(TINY if tiny else VllmBench()), as_json, output)


def _show(
    found: dict, as_json: bool, output: Path | None, table: Callable[[dict], Table] | None = None
) -> None:
    """Prints what was found: as JSON, in the table made of it, or in lines."""
    from blocktune.files import replace_json

    if output is not None:
        replace_json(output, found)
    opt.tell(as_json, found, *([table(found)] if table else _lines(found)))


def _lines(found: dict, indent: str = "") -> list[str]:
    """Names and values, mappings as indented blocks."""
    lines = []
    for name, value in found.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            lines.append(f"{indent}{name}: {shown}")
    return lines
