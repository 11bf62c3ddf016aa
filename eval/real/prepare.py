"""Real questions for training and evaluation: splits, hard distractors, no leaks.

Reads public question sets from a folder (see README.md for their names on the Hub) and writes
JSON lines that `load_examples` reads. Every choice is drawn from one seed.
"""

from __future__ import annotations

import gzip
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import bm25s
import numpy as np

from blocktune import Chunk, RagExample, load_examples

FILES = {
    "hotpotqa": ("train/hotpotqa_train_rows.jsonl.gz", "train/hotpotqa_other_dev_rows.jsonl.gz"),
    "2wiki": ("train/2wikimultihopqa_other_dev_rows.jsonl.gz", "2wikimultihopqa_train500.json"),
    "squad": ("train/squad11_train_44articles.jsonl.gz", "train/squad_800contexts.jsonl.gz"),
    "musique": ("train/musique_other_dev_rows.jsonl.gz",),
}
"""Questions for training; the evaluation takes what the dev files lack from the `_dev` ones."""
DEV_FILES = {
    "hotpotqa": "hotpotqa_dev200.json",
    "2wiki": "2wikimultihopqa_dev200.json",
    "squad": "more/squad11_dev_minus_xquad.jsonl.gz",
    "musique": "musique_dev200.json",
}
CHOICE, TEST = 60, {"hotpotqa": 300, "2wiki": 200, "musique": 287, "squad": 500}
"""Questions a set: to choose settings by, and for the tables."""
MIXTURE = {"hotpotqa": 0.45, "2wiki": 0.15, "squad": 0.40}
"""Shares of the training rows. MuSiQue is never trained on."""
TURNS = 9
"""Further questions asked of a row of the base, at most."""


def prepare(
    data: Path,
    output: Path,
    rows: int,
    base: int,
    passages: tuple[int, int],
    longest: int,
    seed: int,
):
    """Writes ``choice/SET.jsonl``, ``test/SET.jsonl``, ``base.jsonl`` and ``rows.jsonl``.

    The first lines of ``rows.jsonl`` are a valid smaller training set. It has no question in common
    with ``base.jsonl``, and neither has a passage of an evaluation question.

    Args:
        data: Folder of the question sets.
        output: Folder to write to.
        rows: Training rows of the recipes.
        base: Questions to make the rows of the RAG base of.
        passages: Fewest and most passages of a training row.
        longest: Characters of a training passage, at most.
        seed: Of every draw.
    """
    pools, evaluation = _split(data, random.Random(f"split {seed}"))
    items = [item for sets in evaluation.values() for own in sets.values() for item in own]
    seen = {_key(c) for e, others in items for c in (*e.chunks, *others)}
    pools = {name: _trainable(pool, seen, longest) for name, pool in pools.items()}
    counts = {"dropped_passages": len(seen), "pool": {n: len(p) for n, p in pools.items()}}
    for part, sets in evaluation.items():
        for name, items in sets.items():
            rng = random.Random(f"{part} {name} {seed}")
            for number in (5, 10):
                path = output / f"{part}-{number}" / f"{name}.jsonl"
                made = [_row(item, number, rng) for item in items]
                counts[f"{path.parent.name}/{name}"] = _write(path, made)
    for part, number in (("base", base), ("rows", rows)):
        rng = random.Random(f"{part} {seed}")
        drawn = _draw(pools, part, number)
        if part == "base":
            drawn = [item for name in pools for item in _paired(drawn, name)]
        rng.shuffle(drawn)
        made = [_row(item, rng.randint(*passages), rng) for item in drawn]
        if part == "base":
            squad = pools["squad"]
            made = _ask_more(made, [e for e, _ in squad[: _border(squad)]])
        if any(_key(c) in seen for e in made for c in e.chunks):
            raise AssertionError(f"{part} holds a passage of an evaluation question")
        counts[part] = _write(output / f"{part}.jsonl", made)
    (output / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return counts


Item = tuple[RagExample, list[Chunk]]
"""A question over its gold passages, and candidates for distractors, the hardest first."""


def _split(data: Path, rng: random.Random) -> tuple[dict, dict]:
    """Set -> training items, and part -> set -> evaluation items."""
    pools, parts = {}, {"choice": {}, "test": {}}
    for name, dev_file in DEV_FILES.items():
        dev = _items(_read(data / dev_file, name), name)
        train = _items([e for file in FILES[name] for e in _read(data / file, name)], name)
        rng.shuffle(dev)
        if name == "squad":  # the questions to choose by are of other articles than the tables'
            apart = set(sorted({e.chunks[0].title for e, _ in dev})[::8])
            choice = [i for i in dev if i[0].chunks[0].title in apart]
            dev = [i for i in dev if i[0].chunks[0].title not in apart]
            rng.shuffle(train)
            parts["choice"][name], pools[name] = choice[:CHOICE], train
        else:
            later = [i for i in train if "_dev" in i[0].meta["file"] and len(i[1]) > 5]
            rng.shuffle(later)
            wanted = max(0, TEST[name] - len(dev))
            parts["choice"][name] = later[:CHOICE]
            dev += later[CHOICE : CHOICE + wanted]
            held = {id(i) for i in later[: CHOICE + wanted]}
            pools[name] = [i for i in train if id(i) not in held]
            rng.shuffle(pools[name])
        parts["test"][name] = dev[: TEST[name]]
    del pools["musique"]
    return pools, parts


def _read(path: Path, name: str) -> list[RagExample]:
    """Questions with answers and marked evidence; ``meta['file']`` says where one is from."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        found = [
            RagExample(
                question=r["question"].strip(),
                chunks=tuple(
                    Chunk(c["text"].strip(), title=c["title"] or None) for c in r["chunks"]
                ),
                answers=tuple(a for a in r["answers"] if a.strip()),
                supporting=tuple(r["supporting"]),
                id=r["id"],
            )
            for r in records
            if all(c["text"].strip() for c in r["chunks"])
        ]
    else:
        found = load_examples(str(path))
    return [
        replace(e, meta={"file": path.name}, kind=name) for e in found if e.answers and e.supporting
    ]


def _items(examples: Sequence[RagExample], name: str) -> list[Item]:
    """Puts each question's own other passages, or those of its article, in order of BM25."""
    if name != "squad":
        own = [_others(e) for e in examples]
        ranked = [_rank(e.question, o) for e, o in zip(examples, own, strict=True)]
    else:
        articles: dict[str | None, dict[str, Chunk]] = defaultdict(dict)
        for e in examples:
            articles[e.chunks[0].title][e.chunks[0].text] = e.chunks[0]
        indices = {title: _Index(list(found.values())) for title, found in articles.items()}
        ranked = [_without_answer(e, indices[e.chunks[0].title]) for e in examples]
    items = [(_gold(e), c) for e, c in zip(examples, ranked, strict=True)]
    once = {e.question.lower(): (e, c) for e, c in items if len(e.chunks) + len(c) > 4}
    return list(once.values())


class _Index:
    """BM25 over passages; the order of equal scores is that of the passages."""

    def __init__(self, chunks: list[Chunk]):
        self.chunks, self.bm25 = chunks, bm25s.BM25()
        texts = [f"{c.title or ''} {c.text}" for c in chunks]
        self.bm25.index(_words(texts), show_progress=False)

    def best(self, question: str) -> list[Chunk]:
        words = _words([question], return_ids=False)[0]
        scores = self.bm25.get_scores(words) if words else np.zeros(len(self.chunks))
        return [self.chunks[i] for i in np.argsort(-scores, kind="stable")[:30]]


def _words(texts: list[str], return_ids: bool = True):
    return bm25s.tokenize(
        texts, stopwords="en", return_ids=return_ids, show_progress=False, allow_empty=True
    )


def _rank(question: str, chunks: list[Chunk]) -> list[Chunk]:
    return _Index(chunks).best(question) if chunks else []


def _without_answer(example: RagExample, index: _Index) -> list[Chunk]:
    """Other passages of the article, hardest first, without those that hold an answer."""
    answers = [a.lower() for a in example.answers]
    return [
        c
        for c in index.best(f"{example.question}")
        if c.text != example.chunks[0].text and not any(a in c.text.lower() for a in answers)
    ]


def _others(example: RagExample) -> list[Chunk]:
    gold = {example.chunks[i].text for i in example.supporting}
    return [c for c in example.chunks if c.text not in gold]


def _gold(example: RagExample) -> RagExample:
    """The question over its gold passages alone."""
    gold = dict.fromkeys(example.chunks[i] for i in example.supporting)
    return replace(example, chunks=tuple(gold), supporting=tuple(range(len(gold))), response=None)


def _key(chunk: Chunk) -> str:
    """Equal for passages that say the same, whatever their spacing and case."""
    return re.sub(r"\W+", "", chunk.text.lower())[:160]


def _trainable(pool: list[Item], seen: set[str], longest: int) -> list[Item]:
    """Training items without long passages and without those of evaluation questions."""

    def is_fit(chunk: Chunk) -> bool:
        return len(chunk.text) <= longest and _key(chunk) not in seen

    fit = [
        (e, [c for c in others if is_fit(c)]) for e, others in pool if all(map(is_fit, e.chunks))
    ]
    return [(e, others) for e, others in fit if len(e.chunks) + len(others) > 2]


def _draw(pools: dict[str, list[Item]], part: str, number: int) -> list[Item]:
    """Items by the mixture; SQuAD fills up what a small set lacks. Base and rows share none."""
    found: list[Item] = []
    for name in sorted(MIXTURE, key=lambda n: len(pools[n])):
        border = _border(pools[name])
        own = pools[name][:border] if part == "base" else pools[name][border:]
        wanted = number - len(found) if name == "squad" else round(number * MIXTURE[name])
        found += own[:wanted]
    return found


def _border(pool: Sequence[Item]) -> int:
    """Where the questions of the recipes begin; those before are the base's."""
    return len(pool) * 2 // 5


def _paired(items: list[Item], name: str) -> list[Item]:
    """The items of a set; of the multi-hop sets two share a context and are asked in turn.

    Both bring their gold passages and their hardest other one, so that a question costs fewer
    tokens than alone. Questions of SQuAD share contexts by `_ask_more`.
    """
    own = [item for item in items if item[0].kind == name]
    if name == "squad":
        return own
    found = []
    for (a, others_a), (b, others_b) in zip(own[::2], own[1::2], strict=False):
        chunks = dict.fromkeys((*a.chunks, *others_a[:1], *b.chunks, *others_b[:1]))
        places = tuple(range(len(chunks)))  # all stay: each is evidence or its hardest rival
        turn = (b.question, b.answers[0])
        found.append((replace(a, chunks=tuple(chunks), supporting=places, followups=(turn,)), []))
    return found


def _ask_more(rows: list[RagExample], questions: list[RagExample]) -> list[RagExample]:
    """Asks more questions about the passages of a row, as later turns: they cost few tokens."""
    by_text: dict[str, list[RagExample]] = defaultdict(list)
    for e in questions:
        by_text[e.chunks[0].text].append(e)
    found = []
    for row in rows:
        own = [e for c in row.chunks for e in by_text[c.text][:4] if e.question != row.question]
        more = tuple((e.question, e.answers[0]) for e in own[:TURNS])
        found.append(replace(row, followups=row.followups or more))
    return found


def _row(item: Item, number: int, rng: random.Random) -> RagExample:
    """The question over its gold passages and the hardest others, in a drawn order."""
    example, candidates = item
    chunks = list(example.chunks) + candidates[: max(0, number - len(example.chunks))]
    order = rng.sample(range(len(chunks)), len(chunks))
    places = tuple(sorted(order.index(i) for i in example.supporting))
    return replace(example, chunks=tuple(chunks[i] for i in order), supporting=places)


def _write(path: Path, examples: Iterable[RagExample]) -> int:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(e.to_json(), ensure_ascii=False) + "\n" for e in examples]
    path.write_text("".join(lines), encoding="utf-8")
    return len(lines)
