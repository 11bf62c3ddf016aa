"""Time to first token of a prompt whose chunks are all cached, in its parts, and in full."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blocktune.bench.reuse import (
    copy_rate,
    matmul_rate,
    query_only,
    random_pieces,
    ratios,
    spread,
    threads,
    time_methods,
    usage_of,
)
from blocktune.cache import RowCache
from blocktune.engine import Engine
from blocktune.engine.assemble import relocate
from blocktune.engine.generation import Generation
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
    """Times prompts of random tokens, in turn with full prefill, chunks in memory.

    The method is what the weights were trained for. ``lengths`` are tokens of a prompt with its
    question and one answer token; the engine's store must have room for the longest. ``repeats``
    rounds are timed, after one that is not.

    Returns:
        ``lengths``: for each, ``cached_over_full`` (median of the ratios within each round) and its
        ``spread``; ``seconds`` of ``cached`` and ``full``, see `time_methods`; ``parts``: what a
        cached prompt is made of, each with its ``seconds`` and, on a CPU in float32, the
        ``limit``: ``lookup`` of the chunks; ``join``: their copy into one cache (bytes over the
        rate of a plain copy); ``rotate``: what turning the keys costs on top (one more pass over
        the keys); ``question``: its forward pass (operations over the matmul rate, or bytes of
        weights and cache over the copy rate if these take longer). The method, setting and
        provenance.

    Raises:
        ValueError: If a prompt has no room for a chunk and the question.
    """
    method = default_method(engine.prompts.trained)
    found = {}
    with threads(num_threads), torch.no_grad():
        limited = engine.model.device.type == "cpu" and engine.model.dtype == torch.float32
        rates = (copy_rate(repeats), matmul_rate(repeats)) if limited else None
        for length in lengths:
            if length - question < 3 or question < 1 or chunk < 1:
                raise ValueError(
                    f"a prompt of {length} tokens has no room for a question of {question}"
                )
            pieces = random_pieces(len(engine.tokenizer), length - 1, chunk, question, seed)
            found[str(length)] = _timed(engine, pieces, method, repeats, rates)
            engine.forget()
    setting = {"chunk": chunk, "question": question, "repeats": repeats, "threads": num_threads}
    setting |= {"dtype": str(engine.model.dtype), "model": engine.model.config._name_or_path}
    rate = dict(zip(("bytes_per_s_copied", "flops_per_s_matmul"), rates or (), strict=False))
    return {"lengths": found, "method": method.name, **rate, "setting": setting, **provenance(seed)}


def _timed(
    engine: Engine,
    pieces: Pieces,
    method: Method,
    repeats: int,
    rates: tuple[float, float] | None,
) -> dict[str, Any]:
    run = engine.start([pieces], method)
    more = {"question": query_only(engine.model, run), **_assembling(engine, run)}
    times = time_methods(engine, pieces, {"cached": method}, repeats, **more)
    pairs = zip(times.pop("joined"), times["join"], strict=True)
    times["rotate"] = [max(0.0, whole - copied) for whole, copied in pairs]
    over = spread(ratios(times, "cached", "full"))
    limits = {}
    if rates is not None:
        copy, matmul = rates
        states = [tensor for layer in run.cache.layers for tensor in (layer.keys, layer.values)]
        held, weights = (sum(t.nbytes for t in own) for own in (states, engine.model.parameters()))
        question = max(usage_of(engine, pieces, method).flops / matmul, (weights + held) / copy)
        limits = {"join": held / copy, "rotate": held / 2 / copy, "question": question}
    parts = {
        name: {"seconds": spread(times[name])["median"], "limit": limits.get(name)}
        for name in PARTS
    }
    return {
        "cached_over_full": over["median"],
        "spread": over,
        "seconds": {name: spread(times[name])["median"] for name in ("cached", "full")},
        "parts": parts,
    }


def _assembling(engine: Engine, run: Generation) -> dict[str, Callable[[], object]]:
    """Looking chunks up, joining them where they were encoded, and joining them in place."""
    state, layout = engine.state, run.batch.layout

    wanted = run.wanted[0]

    def lookup():
        return state.encoder.find(wanted, Stopwatch(engine.model.device)).kvs

    kvs = [lookup()[piece] for piece in wanted]
    rows = run.assembled.cached[0].nonzero().squeeze(1)
    columns = layout.order[0, rows]
    still = torch.cat([torch.arange(kv.num_tokens) + kv.origin for kv in kvs]).to(columns.device)

    def join(positions):
        cache = RowCache(state.num_layers, 1, run.columns.kind.shape[1], spare=64)
        relocate(cache, 0, kvs, columns, positions, state.rope)

    moved = layout.position[0, rows]
    return {"lookup": lookup, "join": partial(join, still), "joined": partial(join, moved)}


def table(found: Mapping[str, Any]) -> Table:
    """What `bench_ttft` returned: milliseconds, of a part with its limit in brackets."""
    rows = []
    for length, one in found["lengths"].items():
        parts = []
        for part in map(one["parts"].get, PARTS):
            limit = "" if part["limit"] is None else f" ({1e3 * part['limit']:,.1f})"
            parts.append(f"{1e3 * part['seconds']:,.1f}{limit}")
        whole = [f"{1e3 * one['seconds'][name]:,.1f}" for name in ("full", "cached")]
        rows.append((f"{int(length):,}", *whole, f"{one['cached_over_full']:.3f}", *parts))
    return Table(("tokens", "full, ms", "cached, ms", "of full", *PARTS), rows)


def draw_ttft(found: Mapping[str, Any], path: str | Path) -> Path:
    """Picture of `bench_ttft`: seconds to the first token against the length of the prompt."""
    from matplotlib.ticker import FuncFormatter, NullLocator

    from blocktune.evaluation.report.style import label_points, mark, to_png

    lengths = [int(name) for name in found["lengths"]]
    measured = found["lengths"].values()
    lines = {
        "full-prefill": [one["seconds"]["full"] for one in measured],
        found["method"]: [one["seconds"]["cached"] for one in measured],
        "question alone": [one["parts"]["question"]["seconds"] for one in measured],
    }

    def draw(figure, ground) -> None:
        axes, ends = figure.subplots(), []
        for name, seconds in lines.items():
            axes.plot(lengths, seconds, clip_on=False, **mark(ground, name))
            ends.append((lengths[-1], seconds[-1], name))
        axes.set(xscale="log", yscale="log", xlabel="tokens of the prompt")
        axes.set_title("Seconds to the first token")
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xticks(lengths, [f"{length:,}" for length in lengths])
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        label_points(axes, ground, ends)

    return to_png(draw, path, height=3.6)
