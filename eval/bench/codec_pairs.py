"""What a codec costs on real questions: each is answered from chunks as they are and from coded.

    python eval/bench/codec_pairs.py BASE DATA --rows out/rows.jsonl \\
        --output eval/results/bench/codec_pairs.json

``BASE`` and ``DATA`` are a model and a source of worlds, such as ``data/tiny`` and
``worlds:test?seed=1&n=200``, or the base and a part of the data of `eval/real/study.py`, such as
``base`` and ``data/test-5``. Writes a row a question, and continues where it stopped.
"""

import argparse
import json
from itertools import chain, zip_longest
from pathlib import Path
from statistics import fmean

from blocktune import Engine
from blocktune.cache.codecs import round_trip
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
    """Characters of its chunks."""
    return sum(len(chunk.text) for chunk in example.chunks)


def answer(engine: Engine, task, example, codec: str) -> dict[str, float]:
    """F1 by method: of full prefill, from chunks as they are, and from coded ones."""

    def f1(method) -> float:
        engine.forget_prefixes()
        [made] = engine.answer([example], method, max_new_tokens=task.max_new_tokens)
        text = extract_answer(task.cut(made.text), task.answer_marker)
        return METRICS["f1"].score(text, example.answers, None)

    engine.forget()
    found = {f"{name}, as-is": f1(method) for name, method in METHODS.items()}
    for key, entry in engine.store.held().items():
        engine.store.put(key, round_trip(entry, codec, engine.state.rope))
    found |= {f"{name}, {codec}": f1(method) for name, method in METHODS.items()}
    return found | {"full-prefill": f1(build("full-prefill"))}


def summary(rows: list[dict[str, float]], codec: str) -> dict[str, object]:
    """Means and paired differences with 95 % intervals, over all questions and those adjusted."""
    found: dict[str, object] = {}
    for part, kept in (("all", rows), ("adjusted", [r for r in rows if r["full-prefill"] > 0])):
        scores = {name: [row[name] for row in kept] for name in rows[0]}
        found[part] = {"n": len(kept), "full-prefill": fmean(scores["full-prefill"])}
        for name in METHODS:
            one, other = f"{name}, {codec}", f"{name}, as-is"
            minus = difference(scores[one], scores[other])
            changed = sum(row[one] != row[other] for row in kept)
            means = {"as-is": fmean(scores[other]), codec: fmean(scores[one])}
            means |= {"minus": minus.mean, "ci95": minus.ci95}
            found[part][name] = means | {"changed": changed}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base")
    parser.add_argument("data", type=Path)
    parser.add_argument("--sets", nargs="+", default=["hotpotqa", "squad", "2wiki"])
    parser.add_argument("--questions", type=int, default=70, help="of each set, shortest first")
    parser.add_argument("--codec", default="fp8")
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    task = parse_task({"task": "eval/tasks/jsonl.yaml"})
    if given.data.is_dir():
        sets = [load_examples(given.data / f"{name}.jsonl") for name in given.sets]
    else:
        task = parse_task({"name": "worlds", "source": str(given.data), "answer_marker": "Answer:"})
        sets = [load_examples(str(given.data))]
    asked = [sorted(one, key=length)[: given.questions] for one in sets]
    asked = [one for one in chain(*zip_longest(*asked)) if one is not None]
    known = [json.loads(line) for line in whole_lines(given.rows)] if given.rows.exists() else []
    done = {row.pop("id"): row for row in known}
    engine = Engine.from_pretrained(given.base, dtype="float32")
    engine = engine.reworded(task.worded(engine.format))
    for example in asked:
        if example.id not in done:
            done[example.id] = answer(engine, task, example, given.codec)
            with given.rows.open("a", encoding="utf-8") as out:
                out.write(json.dumps({"id": example.id} | done[example.id]) + "\n")
    found = summary([done[example.id] for example in asked], given.codec)
    print(json.dumps(found, indent=1))
    if given.output is not None:
        setting = {name: str(value) for name, value in vars(given).items()}
        replace_json(given.output, found | {"setting": setting, "provenance": provenance()})
