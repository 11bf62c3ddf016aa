"""Accuracy of reuse methods by codec, on the shipped model; takes 10 minutes on two cores.

    python eval/bench/codecs.py --output eval/results/bench/codecs.json

Writes the numbers and prints the table of docs/store.md.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from blocktune import Engine
from blocktune.bench.store import codec_error
from blocktune.cache import ChunkKV, ChunkStore
from blocktune.cache.store.config import CODECS
from blocktune.data import load_examples
from blocktune.evaluation.runner import run_suite
from blocktune.evaluation.suite import parse_suite
from blocktune.files import replace_json
from blocktune.provenance import provenance

METHODS = ["full-prefill", "naive", "cacheblend", "epic", "query-attention", "droidspeak"]
SOURCE = "worlds:test?seed=1&n={}&kinds=self-contained,cross-chunk,2-hop"


def errors(num: int) -> dict[str, dict[str, float]]:
    """Mean bytes and errors by codec, over the chunks of ``num`` questions."""
    store = ChunkStore()
    engine = Engine.from_pretrained("data/tiny", store=store, dtype="bfloat16")
    for example in load_examples(SOURCE.format(num)):
        engine.encode(example.chunks)
    chunks = [entry for entry in store.held().values() if isinstance(entry, ChunkKV)]
    means = {}
    for codec in CODECS:
        by_chunk = [codec_error(chunk, codec, engine.state.rope) for chunk in chunks]
        means[codec] = {
            name: sum(error[name] for error in by_chunk) / len(by_chunk)
            for name in ("bytes_per_token", "key_error", "value_error")
        }
    return means


def accuracy(codec: str, questions: int, folder: Path) -> dict[str, dict[str, float]]:
    """Exact match and adjusted F1 of each method, with chunks stored by a codec."""
    task = {"name": "worlds", "source": SOURCE.format(questions), "answer_marker": "Answer:"}
    record = {"model": "data/tiny", "dtype": "float32", "methods": METHODS, "ttft": {"num": 0}}
    suite = parse_suite(record | {"tasks": [task | {"max_new_tokens": 32}]})
    methods = run_suite(replace(suite, store=f"codec={codec}"), folder / codec)["methods"]
    names = ("em", "adjusted_f1", "n")
    return {method: {name: scores[name] for name in names} for method, scores in methods.items()}


def table(results: dict) -> str:
    """Table of bytes, errors and adjusted F1, one row per codec."""
    head = ["codec", "bytes a token", "error of keys", "of values", *METHODS[1:]]
    lines = [head, ["---"] * len(head)]
    for codec, cost in results["errors"].items():
        scores = (100 * results["accuracy"][codec][m]["adjusted_f1"] for m in METHODS[1:])
        shares = (f"{cost[name]:.2%}" for name in ("key_error", "value_error"))
        lines.append(
            [codec, f"{cost['bytes_per_token']:,.0f}", *shares, *map("{:.1f}".format, scores)]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--questions", type=int, default=200, help="per kind")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        scores = {codec: accuracy(codec, args.questions, Path(temporary)) for codec in CODECS}
    results = {"errors": errors(20), "accuracy": scores, "provenance": provenance()}
    if args.output is not None:
        replace_json(args.output, results)
    print(table(results))
