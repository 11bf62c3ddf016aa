"""`blocktune check`, `blocktune profile-layers`, `blocktune replay` and `blocktune bench`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from typer import Option

from blocktune.commands import app, command
from blocktune.commands import options as opt


@command(
    "check",
    "blocktune check --model data/tiny",
    "blocktune check --method 'naive + first-k 8'   # the contract of one method",
    "blocktune check --method mine --plugin mine.py",
    "blocktune check --model Qwen/Qwen3-8B --dtype float32 --json",
    "blocktune check --families --json       # every model class of the installed transformers",
    "blocktune check --families --only cohere --only gpt_oss",
    "The exit code is 0 if every check passed, else 1.",
)
def check(
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    method: Annotated[
        str | None,
        Option(
            help="Check the contract of this method instead; without --model on a small random one."
        ),
    ] = None,
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = None,
    device: opt.Device = None,
    families: Annotated[
        bool,
        Option("--families", help="Check a tiny model of every causal model class instead."),
    ] = False,
    only: Annotated[
        list[str] | None, Option(help="With --families: only this model type; repeatable.")
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Check that reuse is exact on your model: masks, relocation and caches against dense."""
    if only and not families:
        raise ValueError("--only names a model type of --families; add --families")
    if families:
        _check_families(only or (), as_json)
    from blocktune.adapter.releases import find_release
    from blocktune.check import check_adapter, check_method, check_model
    from blocktune.methods import parse_method
    from blocktune.tables import Table

    built = None if method is None else parse_method(method)
    opt.quiet_libraries()
    limit = None
    if built is None and adapter is not None and find_release(adapter) is None:
        checks = check_adapter(model, adapter, dtype=dtype, device=device, quantize=quantize)
    else:
        engine = None
        if built is None or model is not None or adapter is not None:
            engine = opt.load_engine(model, adapter, None, dtype, device, quantize)
            limit = engine.prompts.exact_tokens
        checks = check_model(engine) if built is None else check_method(built, engine)
    sound = all(one.passed for one in checks)
    if as_json:
        typer.echo(json.dumps({"checks": [one.to_dict() for one in checks]}, indent=2))
    else:
        verdicts = {True: "[green]ok[/green]", False: "[red]FAILED[/red]"}
        rows = [
            (verdicts[one.passed], one.name, f"{one.max_abs_diff:.1e}", f"{one.tolerance:.1e}")
            for one in checks
        ]
        Table(("", "check", "difference", "tolerance"), rows, left=("check",)).show()
        where = "on this model" if built is None else f"by '{built.name}'"
        extent = "" if limit is None else f" up to {limit:,} tokens"
        typer.echo(
            f"Reuse {where} is sound{extent}." if sound else f"Do not serve: reuse {where} fails."
        )
    raise typer.Exit(0 if sound else 1)


def _check_families(only: Sequence[str], as_json: bool) -> NoReturn:
    from rich.console import Console
    from rich.progress import track

    from blocktune.check.families import check_families, model_types, table

    opt.quiet_libraries()
    names = model_types(only)
    console = Console(stderr=True)
    shown = track(check_families(names), "checking", total=len(names), console=console)
    found = list(shown)
    if as_json:
        typer.echo(json.dumps({"families": [one.to_dict() for one in found]}, indent=2))
    else:
        table(found).show()
    raise typer.Exit(int(any(one.verdict == "wrong" for one in found)))


@command(
    "profile-layers",
    "blocktune profile-layers -m data/tiny -i 'worlds:dev?n=32'",
    "blocktune profile-layers -m M -i held_out.jsonl --limit 50 --most-layers 8 --json",
    "Use the result as parameters of the method:",
    "blocktune answer -m M -i q.jsonl --method 'droidspeak first_layer=9 ratio=0.125'",
)
def profile_layers(
    source: Annotated[
        str, Option("--input", "-i", help="Held-out questions: JSONL or any data source.")
    ],
    model: opt.Model = None,
    adapter: opt.Adapter = None,
    limit: opt.Limit = None,
    most_layers: Annotated[
        int | None, Option(min=1, help="Longest range of layers to try. Default: all.")
    ] = None,
    batch_size: Annotated[int, Option(min=1, help="Questions per batch.")] = 8,
    dtype: opt.Dtype = "auto",
    quantize: opt.Quantize = None,
    device: opt.Device = None,
    as_json: opt.AsJson = False,
) -> None:
    """Measure which layers are worth recomputing for all chunks: the profile for `droidspeak`."""
    from rich.console import Console
    from rich.progress import track

    from blocktune.commands.answering import read_examples
    from blocktune.evaluation.fidelity import profile_layers
    from blocktune.tables import Table

    examples = read_examples(source, limit, None, [])
    engine = opt.load_engine(model, adapter, None, dtype, device, quantize)
    console = Console(stderr=True)
    found = profile_layers(
        engine,
        examples,
        most_layers=most_layers,
        batch_size=batch_size,
        progress=lambda ranges: iter(track(ranges, "profiling", console=console)),
    )
    if as_json:
        typer.echo(json.dumps([asdict(one) for one in found], indent=2))
        return
    rows = [
        (
            str(one.first_layer),
            f"{one.ratio:.4g}",
            f"{one.first_layer}-{one.first_layer + one.num_layers - 1}",
            f"{one.divergence:.4f}",
            f"{one.agreement:.0%}",
        )
        for one in found
        if one.efficient
    ]
    Table(("first_layer", "ratio", "layers", "divergence", "agreement"), rows).show()


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
        Path | None, Option(help="Folder for replay.json, replay.png and break_even.png.")
    ] = None,
    as_json: opt.AsJson = False,
) -> None:
    """Play a trace against stores of several sizes and policies: hits and seconds saved."""
    from blocktune.bench import replay as played
    from blocktune.bench.traces import read_requests
    from blocktune.cache.config import parse_bytes
    from blocktune.cache.ledger import POLICIES
    from blocktune.files import replace_json
    from blocktune.tables import Table

    costs = played.Costs(token_bytes=token_bytes, token_s=token_us / 1e6)
    requests = read_requests(trace, limit)
    touched = played.touched_bytes(requests, costs)
    shares = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    budgets = [parse_bytes(b) for b in budget or ()] or [int(touched * s) for s in shares]
    outcomes = [
        played.replay(requests, most, name, costs)
        for name in policy or POLICIES
        for most in budgets
    ]
    found = {"trace": str(trace), "requests": len(requests), "touched_bytes": touched}
    found["outcomes"] = [outcome._asdict() for outcome in outcomes]
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        points = {share: played.break_even(share, costs=costs) for share in (0.0, 0.15)}
        found["break_even"] = {s: [p._asdict() for p in line] for s, line in points.items()}
        replace_json(output / "replay.json", found)
        played.plot_replay(outcomes, output / "replay.png")
        played.plot_break_even(points, output / "break_even.png")
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    rows = [
        (
            o.policy,
            f"{o.budget / 1e9:,.2f}",
            f"{o.hit_rate:.1%}",
            f"{o.saved:.1%}",
            f"{o.saved_s:.1f}",
        )
        for o in outcomes
    ]
    typer.echo(f"{len(requests):,} requests ask for {touched / 1e9:,.1f} GB of different chunks")
    Table(("policy", "GB", "hits", "saved", "saved s"), rows, left=("policy",)).show()


Tokens = Annotated[int, Option(min=2, help="Length of the prompt, in tokens.")]
ChunkTokens = Annotated[int, Option(min=1, help="Tokens per chunk.")]
Repeats = Annotated[int, Option(min=1, help="Rounds; medians are shown.")]
Output = Annotated[Path | None, Option(help="JSON file to write as well.")]
Tiny = Annotated[bool, Option("--tiny", help="A toy model and prompt, for a quick try.")]


group = typer.Typer(no_args_is_help=True, help="Measure speed on this machine.")
app.add_typer(group, name="bench")


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
    picture: Annotated[Path | None, Option(help="PNG to draw: seconds against length.")] = None,
    output: Output = None,
    as_json: opt.AsJson = False,
) -> None:
    """Time first tokens with all chunks cached, in parts beside their limits, and in full."""
    from blocktune.bench.ttft import bench_ttft, draw_ttft, table
    from blocktune.files import replace_json

    if not all(part.strip().isdecimal() for part in tokens.split(",")):
        raise ValueError(f"--tokens must be lengths such as 512,8192, got '{tokens}'")
    lengths = [int(part) for part in tokens.split(",")]
    engine = opt.load_engine(model, adapter, None, dtype, device)
    found = bench_ttft(engine, lengths, chunk=chunk, repeats=repeats, num_threads=threads)
    if output is not None:
        replace_json(output, found)
    if picture is not None:
        draw_ttft(found, picture)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        table(found).show()


@command(
    "loading",
    "blocktune bench loading --folder /mnt/slow   # the disk to measure",
    "blocktune bench loading --tiny --json",
    of=group,
)
def loading(
    tokens: Tokens = 8192,
    chunk: ChunkTokens = 512,
    repeats: Repeats = 5,
    folder: Annotated[
        Path | None, Option(help="Folder for the chunks. Default: the system's temporary one.")
    ] = None,
    tiny: Tiny = False,
    output: Output = None,
    as_json: opt.AsJson = False,
) -> None:
    """Time cacheblend with chunks on disk: loaded before computing, or while computing."""
    from blocktune.bench.reuse import LOADING, TINY, bench_loading

    setting = TINY if tiny else replace(LOADING, tokens=tokens, chunk=chunk)
    _show(bench_loading(replace(setting, repeats=repeats), folder), as_json, output)


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
    folder: Annotated[
        Path | None, Option(help="Folder for the chunks. Default: the system's temporary one.")
    ] = None,
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


def _show(found: dict, as_json: bool, output: Path | None) -> None:
    from blocktune.files import replace_json

    if output is not None:
        replace_json(output, found)
    typer.echo(json.dumps(found, indent=2) if as_json else "\n".join(_lines(found)))


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
