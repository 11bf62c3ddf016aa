"""Accuracy cost of a codec: each question is answered from uncompressed and from coded chunks.

    python eval/bench/codec_pairs.py BASE DATA --rows out/rows.jsonl \\
        --output eval/results/bench/codec_pairs.json

``BASE`` and ``DATA`` are a model and a source of worlds, such as ``data/tiny`` and
``worlds:test?seed=1&n=200``, or the base model and a part of the data of `eval/real/study.py`, such
as ``base`` and ``data/test-5``. Writes one row per question, and continues where it stopped.
"""

import argparse
import json
from itertools import chain, zip_longest
from pathlib import Path
from statistics import fmean

from blocktune import Engine
from blocktune.cache.store.codecs import round_trip
from blocktune.data import load_examples
from blocktune.evaluation.metrics import METRICS, extract_answer
from blocktune.evaluation.significance import difference
from blocktune.evaluation.suite import parse_task
from blocktune.files import replace_json, whole_lines
from blocktune.methods import build, build_entry
from blocktune.provenance import provenance

METHODS = {
    "naive": build("naive"),
    "cacheblend 15 %": build_entry({"name": "cacheblend", "params": {"ratio": 0.15}}),
    "psr": build("psr"),
}


def length(example) -> int:
    """Length of an example's chunks in characters."""
    return sum(len(chunk.text) for chunk in example.chunks)


def answer(engine: Engine, task, example, codec: str) -> dict[str, float]:
    """F1 by method: with chunks as they are, with coded chunks, and with full prefill."""

    def f1(method) -> float:
        engine.forget_prefixes()
        [reply] = engine.answer([example], method, max_new_tokens=task.max_new_tokens)
        text = extract_answer(task.cut(reply.text))
        return METRICS["f1"].score(text, example.answers, None)

    engine.forget()
    scores = {f"{name}, as-is": f1(method) for name, method in METHODS.items()}
    for key, entry in engine.store.held().items():
        engine.store.put(key, round_trip(entry, codec, engine.state.rope))
    scores |= {f"{name}, {codec}": f1(method) for name, method in METHODS.items()}
    return scores | {"full-prefill": f1(build("full-prefill"))}


def summary(rows: list[dict[str, float]], codec: str) -> dict[str, object]:
    """Means and paired differences with 95 % intervals; ``adjusted`` as in `eval/real`."""
    results: dict[str, object] = {}
    for part, kept in (("all", rows), ("adjusted", [r for r in rows if r["full-prefill"] > 0])):
        scores = {name: [row[name] for row in kept] for name in rows[0]}
        results[part] = {"n": len(kept), "full-prefill": fmean(scores["full-prefill"])}
        for name in METHODS:
            coded, plain = f"{name}, {codec}", f"{name}, as-is"
            minus = difference(scores[coded], scores[plain])
            changed = sum(row[coded] != row[plain] for row in kept)
            means = {"as-is": fmean(scores[plain]), codec: fmean(scores[coded])}
            means |= {"minus": minus.mean, "ci95": minus.ci95}
            results[part][name] = means | {"changed": changed}
    return results


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=["hotpotqa", "squad", "2wiki"])
    parser.add_argument("--questions", type=int, default=70, help="per data set, shortest first")
    parser.add_argument("--codec", default="fp8")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    task = parse_task({"task": "eval/tasks/jsonl.yaml"})
    if args.data.is_dir():
        sets = [load_examples(args.data / f"{name}.jsonl") for name in args.sets]
    else:
        task = parse_task({"name": "worlds", "source": str(args.data), "answer_marker": "Answer:"})
        sets = [load_examples(str(args.data))]
    shortest = [sorted(examples, key=length)[: args.questions] for examples in sets]
    questions = [example for example in chain(*zip_longest(*shortest)) if example is not None]
    rows = [json.loads(line) for line in whole_lines(args.rows)] if args.rows.exists() else []
    done = {row.pop("id"): row for row in rows}
    engine = Engine.from_pretrained(args.base, dtype="float32")
    engine = engine.reworded(task.worded(engine.format))
    for example in questions:
        if example.id not in done:
            done[example.id] = answer(engine, task, example, args.codec)
            with args.rows.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"id": example.id} | done[example.id]) + "\n")
    results = summary([done[example.id] for example in questions], args.codec)
    print(json.dumps(results, indent=1))
    if args.output is not None:
        setting = {name: str(value) for name, value in vars(args).items()}
        replace_json(args.output, results | {"setting": setting, "provenance": provenance()})
