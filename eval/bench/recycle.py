"""Recycled prompts on GPT-2's architecture: cost, depth and fidelity by overlap. Takes minutes.

    python eval/bench/recycle.py --embedder FOLDER --output eval/results/bench/recycle.json

Reproduces the table of KV Cache Recycling (arXiv:2512.11851) in CPU time and tokens. The paper uses
DialoGPT-medium, which has this architecture. The weights here are random, since neither the amount
of computation nor its exactness depends on them.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from blocktune import Engine
from blocktune.cache.store.records import MODEL, Embedder
from blocktune.data import load_examples
from blocktune.files import replace_json
from blocktune.methods import build
from blocktune.prompt import PromptFormat
from blocktune.provenance import provenance

PASSAGES, QUESTIONS, NEW_TOKENS = 16, 8, 8
FORMAT = PromptFormat(instruction="", question="{question}")


def gpt2(width: int, layers: int) -> Engine:
    """Builds an engine with random weights, large enough that positions and context matter."""
    tokenizer = AutoTokenizer.from_pretrained("data/tiny")
    tokenizer.chat_template = None
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=width,
        n_layer=layers,
        n_head=width // 32,
        n_positions=2048,
        initializer_range=0.1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return Engine(GPT2LMHeadModel(config).eval(), tokenizer, format=FORMAT)


def prompts() -> list[dict]:
    """Makes questions over `PASSAGES` passages each."""
    examples = load_examples(f"worlds:test?seed=1&n={QUESTIONS}&kinds=self-contained")
    pool = [chunk for example in examples for chunk in example.chunks]
    requests = []
    for index, example in enumerate(examples):
        chunks = (pool[index * 3 :] + pool[: index * 3])[:PASSAGES]
        requests.append({"question": example.question, "chunks": chunks})
    return requests


def row(engine: Engine, embed: Embedder, method, kept: int, requests: list[dict]) -> dict:
    """Means over questions, each requests after another prompt that shares ``kept`` passages."""
    sums: dict[str, float] = {}
    for number, request in enumerate(requests):
        salted = engine.salted(f"{kept} {number}")
        other = requests[(number + 1) % len(requests)]["chunks"]
        earlier = request["chunks"][:kept] or other[:PASSAGES]
        salted.answer([{"question": "Who?", "chunks": earlier}], method, max_new_tokens=1)
        plain, baseline_s = timed(salted, request, build("full-prefill"))
        reused, recycled_s = timed(salted, request, method)
        depth = reused.usage.prefix_tokens
        vectors = embed([plain.text or " ", reused.text or " "])
        values = {
            "overlap": depth / reused.usage.prompt_tokens,
            "prompt_tokens": reused.usage.prompt_tokens,
            "reuse_depth": depth,
            "computed_tokens": reused.usage.prompt_tokens - depth,
            "baseline_cpu_s": baseline_s,
            "recycled_cpu_s": recycled_s,
            "flops_share": reused.usage.flops / plain.usage.flops,
            "same_tokens": float(plain.token_ids == reused.token_ids),
            "output_similarity": float(vectors[0] @ vectors[1]),
        }
        sums = {name: sums.get(name, 0.0) + value for name, value in values.items()}
    means = {name: value / len(requests) for name, value in sums.items()}
    saved = 1 - means["recycled_cpu_s"] / means["baseline_cpu_s"]
    return {"passages_kept": kept, **means, "cpu_saved": saved}


def timed(engine: Engine, ask: dict, method) -> tuple:
    """Returns an answer and its CPU seconds, including embedding the prompt."""
    started = time.process_time()
    answer = engine.answer([ask], method, max_new_tokens=NEW_TOKENS)[0]
    return answer, time.process_time() - started


def table(rows: list[dict]) -> str:
    """The table of docs/methods.md."""
    head = [
        *("passages kept", "reuse depth", "of prompt tokens", "CPU full", "CPU recycled", "saved"),
        *("operations", "same answers", "similarity"),
    ]
    lines = [head, ["---"] * len(head)]
    for result in rows:
        lines.append(
            [
                f"{result['passages_kept']} of {PASSAGES}",
                f"{result['reuse_depth']:,.0f}",
                f"{result['prompt_tokens']:,.0f}",
                f"{1000 * result['baseline_cpu_s']:,.0f} ms",
                f"{1000 * result['recycled_cpu_s']:,.0f} ms",
                f"{result['cpu_saved']:.0%}",
                f"{result['flops_share']:.0%}",
                f"{result['same_tokens']:.0%}",
                f"{result['output_similarity']:.3f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embedder", default=MODEL, help="sentence-transformers model")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    engine = gpt2(args.width, args.layers)
    embed = Embedder.of(engine.store, args.embedder)
    method, asked = build("recycle", model=args.embedder), prompts()
    row(engine, embed, method, 1, asked[:2])  # warms up
    rows = [row(engine, embed, method, kept, asked) for kept in (0, 4, 8, 12, 16)]
    if args.output is not None:
        shape = {"width": args.width, "layers": args.layers}
        replace_json(args.output, {"rows": rows, "model": shape, "provenance": provenance()})
    print(table(rows))
