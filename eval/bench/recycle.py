"""Recycled prompts on GPT-2's architecture: cost, depth and fidelity by overlap; minutes on a core.

    python eval/bench/recycle.py --embedder FOLDER --output eval/results/bench/recycle.json

The table of KV Cache Recycling (arXiv:2512.11851) in processor time and tokens. Its testbed,
DialoGPT-medium, has this architecture; the weights here are random, since what is computed and
whether it is the same do not depend on them.
"""

import argparse
import time
from pathlib import Path

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from blocktune import Engine
from blocktune.cache.records import MODEL, Embedder
from blocktune.data import load_examples
from blocktune.files import replace_json
from blocktune.methods import build
from blocktune.prompt import PromptFormat
from blocktune.provenance import provenance

PASSAGES, QUESTIONS, NEW_TOKENS = 16, 8, 8
FORMAT = PromptFormat(instruction="", question="{question}")


def gpt2(width: int, layers: int) -> Engine:
    """An engine over random weights in which positions and earlier tokens matter."""
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
    """Questions over many passages."""
    examples = load_examples(f"worlds:test?seed=1&n={QUESTIONS}&kinds=self-contained")
    pool = [chunk for example in examples for chunk in example.chunks]
    made = []
    for index, example in enumerate(examples):
        chunks = (pool[index * 3 :] + pool[: index * 3])[:PASSAGES]
        made.append({"question": example.question, "chunks": chunks})
    return made


def row(engine: Engine, embed: Embedder, method, kept: int, asked: list[dict]) -> dict:
    """Means over questions, each asked after an earlier prompt that shares ``kept`` passages."""
    sums: dict[str, float] = {}
    for number, new in enumerate(asked):
        own = engine.salted(f"{kept} {number}")
        other = asked[(number + 1) % len(asked)]["chunks"]
        earlier = new["chunks"][:kept] or other[:PASSAGES]
        own.answer([{"question": "Who?", "chunks": earlier}], method, max_new_tokens=1)
        plain, baseline_s = timed(own, new, build("full-prefill"))
        reused, recycled_s = timed(own, new, method)
        depth = reused.usage.prefix_tokens
        vectors = embed([plain.text or " ", reused.text or " "])
        facts = {
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
        sums = {name: sums.get(name, 0.0) + value for name, value in facts.items()}
    means = {name: value / len(asked) for name, value in sums.items()}
    saved = 1 - means["recycled_cpu_s"] / means["baseline_cpu_s"]
    return {"passages_kept": kept, **means, "cpu_saved": saved}


def timed(engine: Engine, ask: dict, method) -> tuple:
    """An answer and the processor seconds that it took, embedding the prompt included."""
    started = time.process_time()
    answer = engine.answer([ask], method, max_new_tokens=NEW_TOKENS)[0]
    return answer, time.process_time() - started


def table(rows: list[dict]) -> str:
    """For docs/methods.md."""
    head = [
        *("passages kept", "reuse depth", "of prompt tokens", "CPU full", "CPU recycled", "saved"),
        *("operations", "same answers", "similarity"),
    ]
    lines = [head, ["---"] * len(head)]
    for one in rows:
        lines.append(
            [
                f"{one['passages_kept']} of {PASSAGES}",
                f"{one['reuse_depth']:,.0f}",
                f"{one['prompt_tokens']:,.0f}",
                f"{1000 * one['baseline_cpu_s']:,.0f} ms",
                f"{1000 * one['recycled_cpu_s']:,.0f} ms",
                f"{one['cpu_saved']:.0%}",
                f"{one['flops_share']:.0%}",
                f"{one['same_tokens']:.0%}",
                f"{one['output_similarity']:.3f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embedder", default=MODEL, help="sentence-transformers model")
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    engine = gpt2(given.width, given.layers)
    embed = Embedder.of(engine.store, given.embedder)
    method, asked = build("recycle", model=given.embedder), prompts()
    row(engine, embed, method, 1, asked[:2])  # warms up
    rows = [row(engine, embed, method, kept, asked) for kept in (0, 4, 8, 12, 16)]
    if given.output is not None:
        shape = {"width": given.width, "layers": given.layers}
        replace_json(given.output, {"rows": rows, "model": shape, "provenance": provenance()})
    print(table(rows))
