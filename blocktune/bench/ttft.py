"""Benchmark of time to first token: cached chunks against full prefill, with a breakdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blocktune.bench import reuse
from blocktune.cache import RowCache
from blocktune.engine import Engine
from blocktune.engine.assemble import relocate
from blocktune.engine.usage import Stopwatch
from blocktune.methods import Method, default_method
from blocktune.prompt import Pieces
from blocktune.provenance import provenance
from blocktune.tables import Table

LENGTHS = (512, 1024, 2048, 4096, 8192)
PARTS = ("lookup", "join", "rotate", "question")


def bench_ttft(
    engine: Engine,
    lengths: Sequence[int] = LENGTHS,
    *,
    chunk: int = 128,
    question: int = 32,
    repeats: int = 3,
    num_threads: int = 2,
    seed: int = 0,
) -> dict[str, Any]:
    """Times prompts of random tokens with chunks in memory, in turn with full prefill.

    The method is the one that the weights were trained for. ``lengths`` are tokens of a prompt with
    its question and one answer token. ``repeats`` rounds are timed, after an untimed one.

    By length, there are ``cached_over_full`` (median) and its ``spread``; ``seconds`` of ``cached``
    and ``full``, see `time_methods`; and ``parts`` of a cached prompt, with ``seconds`` and, on a
    CPU in float32, the machine's ``limit``: ``lookup``; ``join`` into one cache (copy rate);
    ``rotate``, the added time of relocating keys (another pass); the ``question`` (FLOPs at the
    matmul rate, or weights and cache at the copy rate). Raises ValueError if a prompt or the
    engine's store has no room.
    """
    if min(lengths) - question < 3 or question < 1 or chunk < 1:
        least = min(lengths)
        raise ValueError(f"a prompt of {least} tokens has no room for a question of {question}")
    if (most := max(lengths)) > (limit := engine.prompts.longest):
        raise ValueError(f"a prompt of {most} tokens does not fit, this model's longest is {limit}")
    method = default_method(engine.prompts.trained)
    timed = {}
    with reuse.threads(num_threads), torch.no_grad():
        has_limit = engine.model.device.type == "cpu" and engine.model.dtype == torch.float32
        rates = reuse.rates(repeats) if has_limit else None
        for length in lengths:
            pieces = reuse.random_pieces(len(engine.tokenizer), length - 1, chunk, question, seed)
            timed[str(length)] = _timed(engine, pieces, method, repeats, rates)
            engine.forget()
    setting = {"chunk": chunk, "question": question, "repeats": repeats, "threads": num_threads}
    setting |= {"dtype": str(engine.model.dtype), "model": engine.model.config._name_or_path}
    rate = dict(zip(("bytes_per_s_copied", "flops_per_s_matmul"), rates or (), strict=False))
    return {"lengths": timed, "method": method.name, **rate, "setting": setting, **provenance(seed)}


def _timed(
    engine: Engine, pieces: Pieces, method: Method, repeats: int, rates: tuple[float, float] | None
) -> dict[str, Any]:
    run = engine.start([pieces], method)
    usage = reuse.usage_of(engine, pieces, method)
    if usage.chunk_misses:
        prompt = f"the engine's store has no room for the chunks of {pieces.num_tokens:,} tokens"
        raise ValueError(f"{prompt}; give it more memory, or shorter prompts")
    state, layout, wanted = engine.state, run.batch.layout, run.wanted[0]

    def lookup():
        return state.encoder.find(wanted, Stopwatch(engine.model.device)).kvs

    kvs = [lookup()[piece] for piece in wanted]
    rows = run.assembled.cached[0].nonzero().squeeze(1)
    columns = layout.order[0, rows]
    origins = torch.cat([torch.arange(kv.num_tokens) + kv.origin for kv in kvs]).to(columns.device)

    def join(positions):
        cache = RowCache(state.num_layers, 1, run.columns.kind.shape[1], spare=64)
        relocate(cache, 0, kvs, columns, positions, state.rope)

    more = {"question": reuse.query_only(engine.model, run), "lookup": lookup}
    more |= {"join": partial(join, origins), "relocate": partial(join, layout.position[0, rows])}
    times = reuse.time_methods(engine, pieces, {"cached": method}, repeats, **more)
    pairs = zip(times.pop("relocate"), times["join"], strict=True)
    times["rotate"] = [max(0.0, relocate_s - join_s) for relocate_s, join_s in pairs]
    over = reuse.spread(reuse.ratios(times, "cached", "full"))
    limits = {}
    if rates is not None:
        copy, matmul = rates
        states = [tensor for layer in run.cache.layers for tensor in (layer.keys, layer.values)]
        cached, weights = (sum(t.nbytes for t in ts) for ts in (states, engine.model.parameters()))
        question = max(usage.flops / matmul, (weights + cached) / copy)
        limits = {"join": cached / copy, "rotate": cached / 2 / copy, "question": question}
    medians = {name: reuse.spread(values)["median"] for name, values in times.items()}
    return {
        "cached_over_full": over["median"],
        "spread": over,
        "seconds": {name: medians[name] for name in ("cached", "full")},
        "parts": {n: {"seconds": medians[n], "limit": limits.get(n)} for n in PARTS},
    }


def table(found: Mapping[str, Any]) -> Table:
    """Table of a `bench_ttft` result, in milliseconds; limits of parts are in brackets."""
    rows = []
    for length, result in found["lengths"].items():
        parts = []
        for part in map(result["parts"].get, PARTS):
            limit = "" if part["limit"] is None else f" ({1e3 * part['limit']:,.1f})"
            parts.append(f"{1e3 * part['seconds']:,.1f}{limit}")
        whole = [f"{1e3 * result['seconds'][name]:,.1f}" for name in ("full", "cached")]
        rows.append((f"{int(length):,}", *whole, f"{result['cached_over_full']:.3f}", *parts))
    return Table(("tokens", "full, ms", "cached, ms", "of full", *PARTS), rows)


def draw_ttft(found: Mapping[str, Any], path: str | Path) -> Path:
    """Plots seconds to the first token against the prompt length, of a `bench_ttft` result."""
    from matplotlib.ticker import FuncFormatter, LogFormatter, NullLocator

    from blocktune.evaluation.report.style import label_ends, mark, to_png

    lengths = [int(name) for name in found["lengths"]]
    results = found["lengths"].values()
    lines = {
        "full-prefill": [result["seconds"]["full"] for result in results],
        found["method"]: [result["seconds"]["cached"] for result in results],
        "question alone": [result["parts"]["question"]["seconds"] for result in results],
    }

    def draw(figure, ground) -> None:
        axes, ends = figure.subplots(), {}
        for name, seconds in lines.items():
            axes.plot(lengths, seconds, clip_on=False, **mark(ground, name))
            ends[name] = seconds[-1], mark(ground, name)["color"]
        axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt")
        axes.set_title("Seconds to the first token")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(LogFormatter())  # the default one writes formulas
        label_ends(axes, ends)

    return to_png(draw, path, height=3.6)
