"""Benchmark of cached chunks in vLLM against its prefill and prefix cache, on a random Llama."""

from __future__ import annotations

import os
import random
import statistics
import time
import timeit
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from blocktune.bench.reuse import random_model
from blocktune.methods import build
from blocktune.prompt import Pieces
from blocktune.provenance import provenance
from blocktune.vllm import ChunkLLM, Rendered

GOAL_AT = 4096
FULL_ROUNDS = 3  # timed rounds of the full prefill, which takes longest


@dataclass(frozen=True)
class VllmBench:
    """Setting: prompts of random tokens, whose chunks are in the store and in memory."""

    tokens: tuple[int, ...] = (1024, 2048, 4096, 8192)  # prompt lengths
    chunk: int = 128  # tokens per chunk
    question: int = 32  # tokens of the question
    layers: int = 8
    width: int = 512  # hidden size
    heads: int = 8
    kv_heads: int = 8
    repeats: int = 7  # timed rounds, after an untimed one
    corpus: int = 24  # chunks of the trace
    most: int = 12  # chunks of a prompt of the trace, drawn from them in random order
    trace: int = 16  # prompts of the trace
    seed: int = 0


TINY = VllmBench((256, 512), 64, 16, 2, 128, 4, 2, repeats=2, corpus=4, most=2, trace=4)


def bench_vllm(setting: VllmBench) -> dict[str, Any]:
    """Times first tokens by prompt length, and a trace.

    By length: CPU seconds (``cpu_s``, all threads) and wall-clock seconds of a full prefill, of
    chunks in memory (``cached``) and on disk, and of another question over chunks still in vLLM's
    pages (``paged``); ``copy_s`` and ``write_s``, CPU seconds of copying the keys and values, and
    of writing them into the pages. Ratios are of CPU time, without waiting if
    ``OMP_WAIT_POLICY=passive`` is set before torch is imported. ``load_over_...`` divide the growth
    of ``cached`` minus ``paged``, from shortest to longest prompt, by that of the denominator.
    """
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # to measure its CPU time
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # its log goes to stdout, like the JSON
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB; default: most of the memory
    draw = random.Random(setting.seed)
    with TemporaryDirectory() as folder:
        longest = max(setting.tokens) + 64
        for part in random_model(setting, setting.width * 3, longest):
            part.save_pretrained(Path(folder) / "model")
        options = {"enforce_eager": True, "disable_log_stats": True, "max_num_seqs": 4}
        options |= {"max_model_len": longest, "dtype": "float32", "host_gb": 4}
        llm = ChunkLLM(f"{folder}/model", store=Path(folder) / "store", **options)
        llm.encode(())  # writes the model's manifest to the store
        lengths = {str(n): _time_length(llm, setting, n, draw) for n in setting.tokens}
        trace = _time_trace(llm, setting, draw)
    goal = str(min(setting.tokens, key=lambda n: abs(n - GOAL_AT)))
    least, most = (lengths[str(pick(setting.tokens))] for pick in (min, max))
    cached, paged = (most[name]["cpu_s"] - least[name]["cpu_s"] for name in ("cached", "paged"))
    copied, written = (most[name] - least[name] for name in ("copy_s", "write_s"))
    ratios = {
        "cached_over_full": lengths[goal]["cached_over_full"],
        "load_over_write": (cached - paged) / written,
        "load_over_copy": (cached - paged) / copied,
        "cached_over_copy": cached / copied,
        "requests_over_prefix_cache": trace["requests_over_prefix_cache"],
    }
    record = {"setting": asdict(setting), "found": ratios, "lengths": lengths, "trace": trace}
    return record | {"provenance": provenance()}


def _ids(draw: random.Random, count: int) -> tuple[int, ...]:
    return tuple(draw.randrange(256) for _ in range(count))


def _prompt(llm: ChunkLLM, chunks: Sequence[tuple[int, ...]], question) -> Rendered:
    pieces = Pieces((llm.client.tokenizer.bos_token_id,), tuple(chunks), question)
    rendered = llm.client.render(pieces, build("naive"), 1)
    if missing := llm.client.missing(rendered.plan):
        llm.encode(missing)
    return rendered


def _time_length(llm: ChunkLLM, setting: VllmBench, tokens: int, draw) -> dict[str, Any]:
    count = (tokens - setting.question) // setting.chunk
    chunks = [_ids(draw, setting.chunk) for _ in range(count)]
    times: dict[str, list[tuple[float, float]]] = {}
    for round in range(setting.repeats + 1):  # the first round is a warm-up
        cached, other = (_prompt(llm, chunks, _ids(draw, setting.question)) for _ in range(2))
        prompts = {"full": cached._replace(plan=None), "disk": cached}
        for name, prompt in (prompts | {"cached": cached, "paged": other}).items():
            if name == "full" and round > FULL_ROUNDS:
                continue
            if name != "paged":
                llm.llm.reset_prefix_cache(reset_connector=name == "disk")
            times.setdefault(name, []).append(_timed(llm, prompt))
    result: dict[str, Any] = {}
    for name, (_, *values) in times.items():
        cpu_s, wall_s = map(statistics.median, zip(*values, strict=True))
        result[name] = {"cpu_s": cpu_s, "wall_s": wall_s}
    result["cached_over_full"] = result["cached"]["cpu_s"] / result["full"]["cpu_s"]
    size = setting.width // setting.heads * setting.kv_heads * setting.layers * 2
    result["bytes"] = size * count * setting.chunk * 4
    source = torch.ones(result["bytes"] // 4)
    target = torch.zeros_like(source)
    result["copy_s"] = _least_cpu_s(lambda: target.copy_(source), runs=5)
    llm.llm.reset_prefix_cache()
    result["write_s"] = _write_s(count, setting)
    return result


def _least_cpu_s(work: Callable[[], object], runs: int) -> float:
    return min(timeit.repeat(work, timer=time.process_time, number=1, repeat=runs))


def _write_s(count: int, setting: VllmBench) -> float:
    """CPU seconds to write ``count`` chunks into vLLM's pages, from states in the CPU's cache."""
    from vllm.distributed.kv_transfer import get_kv_transfer_group

    keys = torch.rand(setting.chunk, setting.kv_heads, setting.width // setting.heads)
    slots = torch.arange(setting.chunk)
    modules = [module for module, *_ in get_kv_transfer_group().worker.places.values()]

    def write() -> None:
        for module in modules:
            for start in range(0, count * setting.chunk, setting.chunk):
                module.impl.do_kv_cache_update(module, keys, keys, module.kv_cache, slots + start)

    return _least_cpu_s(write, runs=3)


def _timed(llm: ChunkLLM, rendered: Rendered) -> tuple[float, float]:
    from vllm import SamplingParams

    cpu, wall = time.process_time(), time.perf_counter()
    llm.generate([rendered], SamplingParams(temperature=0, max_tokens=1))
    return time.process_time() - cpu, time.perf_counter() - wall


def _time_trace(llm: ChunkLLM, setting: VllmBench, draw: random.Random) -> dict[str, float]:
    corpus = [_ids(draw, setting.chunk) for _ in range(setting.corpus)]
    drawn = (draw.sample(corpus, setting.most) for _ in range(setting.trace))
    prompts = [_prompt(llm, chunks, _ids(draw, setting.question)) for chunks in drawn]
    plain = [prompt._replace(plan=None) for prompt in prompts]
    rates = {}
    for name, requests in (("prefix_cache", plain), ("cached_chunks", prompts)):
        llm.llm.reset_prefix_cache(reset_connector=True)
        seconds = sum(_timed(llm, request)[1] for request in requests)
        rates[f"{name}_per_s"] = setting.trace / seconds
    ratio = rates["cached_chunks_per_s"] / rates["prefix_cache_per_s"]
    return rates | {"requests_over_prefix_cache": ratio}
