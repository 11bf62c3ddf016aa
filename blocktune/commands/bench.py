"""`blocktune replay` and `blocktune bench`: what a store would save, and this machine's speed."""

import itertools
import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from blocktune.commands import options as opt
from blocktune.commands.application import command, new_group
from blocktune.commands.options import option


@command(
    "blocktune replay trace.jsonl --budget 10GB --budget 50GB --output out/replay",
    "blocktune replay mooncake_trace.jsonl.gz --policy lru --policy gdsf --budget 100GB --json",
    "blocktune replay zipf --limit 10000   # a synthetic trace",
    "Record a trace with `--store chunks/,trace=trace.jsonl`.",
)
def replay(
    trace: Annotated[
        str, typer.Argument(help="Trace of a store, Mooncake or Azure (JSONL, CSV, .gz); or zipf.")
    ],
    budget: option(list[str] | None, "Store size; repeatable. Default: 1 to 50 % of all.") = None,
    policy: option(list[str] | None, "lru, lfu, fifo or gdsf; repeatable. Default: all.") = None,
    limit: option(int | None, "Use only the first N requests.", min=1) = None,
    token_bytes: option(int, "Bytes per token, if not traced.", min=1, max=1 << 30) = 131_072,
    token_us: option(float, "Microseconds to encode a token.", min=0, max=1e9) = 100.0,
    output: opt.to_folder("Folder for replay.json and two plots (PNG).") = None,
    as_json: opt.AsJson = False,
) -> None:
    """Simulate a trace on stores of several sizes and policies: hits and seconds saved."""
    from blocktune.bench import replay as simulation
    from blocktune.cache.store.config import parse_bytes
    from blocktune.cache.store.ledger import POLICIES
    from blocktune.files import replace_json
    from blocktune.provenance import provenance

    if output is not None:
        import matplotlib  # noqa: F401  # reports a missing extra before the simulation
    costs = simulation.Costs(token_bytes=token_bytes, token_s=token_us / 1e6)
    requests = simulation.read_requests(trace, limit)
    requested = simulation.touched_bytes(requests, costs)
    budgets = [parse_bytes(text) for text in budget or ()]
    budgets = budgets or [int(requested * share) for share in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)]
    pairs = itertools.product(policy or POLICIES, budgets)
    outcomes = [simulation.replay(requests, size, name, costs) for name, size in pairs]
    result = {"trace": trace, "requests": len(requests), "touched_bytes": requested}
    result["outcomes"] = [outcome._asdict() for outcome in outcomes]
    if output is not None:
        points = {share: simulation.break_even(share, costs=costs) for share in (0.0, 0.15)}
        result["provenance"] = provenance()
        result["break_even"] = {s: [p._asdict() for p in line] for s, line in points.items()}
        replace_json(output / "replay.json", result)
        simulation.plot_replay(outcomes, output / "replay.png")
        simulation.plot_break_even(points, output / "break_even.png")
    rows = []
    for o in outcomes:
        shares = f"{o.hit_rate:.1%}", f"{o.saved:.1%}"
        rows.append((o.policy, f"{o.budget / 1e9:,.2f}", *shares, f"{o.saved_s:.1f}"))
    line = f"{len(requests):,} requests use {requested / 1e9:,.1f} GB of distinct chunks"
    table = opt.Table(("policy", "GB", "hits", "saved", "saved s"), rows, left=("policy",))
    opt.tell(as_json, result, line, table)


Tokens = option(int, "Length of the prompt, in tokens.", min=2)
ChunkTokens = option(int, "Tokens per chunk.", min=1)
Repeats = option(int, "Number of runs; medians are shown.", min=1)
Folder = opt.to_folder("For the chunks. Default: the temporary folder.", "--folder")
Output = opt.to_file("Also write the results to a JSON file.")
Tiny = option(bool, "A toy model and prompt instead, for a quick try.", "--tiny")

bench_command = new_group("bench", "Measure speed on this machine.", "blocktune bench reuse --tiny")


@bench_command("blocktune bench attention --json")
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


@bench_command(
    "blocktune bench reuse --tokens 4096 --repeats 3 --output out/reuse.json",
    "blocktune bench reuse --tiny   # takes seconds",
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


@bench_command(
    "blocktune bench ttft --model data/tiny --tokens 512,1024 --picture out/ttft.png",
    "blocktune bench ttft --adapter out/block --repeats 5 --json",
)
def ttft(
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    tokens: option(str, "Lengths of the prompt.", metavar="N,N,...") = "512,1024,2048,4096,8192",
    chunk: ChunkTokens = 128,
    repeats: Repeats = 3,
    threads: option(int, "Threads that PyTorch may use.", min=1) = 2,
    dtype: opt.Dtype = "float32",
    device: opt.Device = None,
    picture: opt.to_file("PNG of seconds against length.", "--picture") = None,
    output: Output = None,
    as_json: opt.AsJson = False,
) -> None:
    """Measure time to first token with all chunks cached, by parts, and with full prefill."""
    from blocktune.bench.ttft import bench_ttft, draw_ttft, table

    if picture is not None:
        import matplotlib  # noqa: F401  # reports a missing extra before anything is measured
    if not all(part.strip().isdecimal() for part in tokens.split(",")):
        raise ValueError(f"--tokens must be lengths such as 512,8192, got '{tokens}'")
    lengths = [int(part) for part in tokens.split(",")]
    engine = opt.load_engine(model, adapter, "memory=1TB", dtype, device)  # all chunks fit
    result = bench_ttft(engine, lengths, chunk=chunk, repeats=repeats, num_threads=threads)
    _show(result, as_json, output, table(result))
    if picture is not None:
        draw_ttft(result, picture)


@bench_command(
    "blocktune bench store --json",
    "blocktune bench store --folder /mnt/nvme --output out/store.json",
)
def store(
    tokens: Tokens = 8192,
    chunk: ChunkTokens = 512,
    repeats: Repeats = 5,
    keys: option(int, "Number of keys in the index.", min=1) = 1_000_000,
    folder: Folder = None,
    tiny: Tiny = False,
    output: Output = None,
    as_json: opt.AsJson = False,
) -> None:
    """Time loading cached chunks from disk and memory, lookups and codecs."""
    from blocktune.bench.store import QUICK, STORE, bench_store

    setting = QUICK if tiny else replace(STORE, tokens=tokens, chunk=chunk, repeats=repeats)
    _show(bench_store(setting, folder, min(keys, 1000) if tiny else keys), as_json, output)


@bench_command(
    "blocktune bench vllm --json   # in an environment with vLLM", "blocktune bench vllm --tiny"
)
def vllm(tiny: Tiny = False, output: Output = None, as_json: opt.AsJson = False) -> None:
    """Measure time to first token on vLLM: cached chunks, full prefill and prefix cache."""
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # CPU seconds without waiting in a loop
    from blocktune.bench.vllm import TINY, VllmBench, bench_vllm

    _show(bench_vllm(TINY if tiny else VllmBench()), as_json, output)


def _show(result: dict, as_json: bool, output: Path | None, table: opt.Table | None = None) -> None:
    from blocktune.files import replace_json

    if output is not None:
        replace_json(output, result)
    opt.tell(as_json, result, *(_lines(result) if table is None else [table]))


def _lines(result: dict, indent: str = "") -> list[str]:
    lines = []
    for name, value in result.items():
        if isinstance(value, dict):
            lines += [f"{indent}{name}", *_lines(value, indent + "  ")]
        else:
            shown = f"{value:.4g}" if isinstance(value, float) else value
            lines.append(f"{indent}{name}: {shown}")
    return lines
