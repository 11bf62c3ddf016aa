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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

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
BASE_SHARE = 0.4
"""Of each set's training questions: those of the RAG base; the recipes have the others."""
TURNS = {"base": 9, "rows": 4}
"""Further questions asked of a row, at most, in the parts that ask several."""


class Item(NamedTuple):
    """A question over its gold passages, and other passages, the hardest first."""

    example: RagExample
    others: list[Chunk]


def prepare(data: Path, output: Path, settings: dict) -> dict:
    """Writes ``{choice,test}-{5,10}/SET.jsonl``, ``base.jsonl`` and ``rows.jsonl``.

    The first lines of ``rows.jsonl`` are a valid smaller training set. It has no question in common
    with ``base.jsonl``, and neither has a passage of an evaluation question.

    Args:
        data: Folder of the question sets.
        output: Folder to write to.
        settings: questions of the ``rows`` of the recipes and of the ``base``, fewest and most
            ``passages`` of a row, ``longest`` passage in characters, ``seed``. With ``shared`` the
            rows of the recipes ask several questions too, as those of the base do.

    Returns:
        What was written, as counts; also in ``counts.json``.
    """
    seed = settings["seed"]
    pools, evaluation = _split(data, random.Random(f"split {seed}"))
    asked = [item for sets in evaluation.values() for own in sets.values() for item in own]
    seen = {_key(c) for item in asked for c in (*item.example.chunks, *item.others)}
    pools = {name: _trainable(pool, seen, settings["longest"]) for name, pool in pools.items()}
    made = {}
    for part, sets in evaluation.items():
        for name, items in sets.items():
            rng = random.Random(f"{part} {name} {seed}")
            for number in (5, 10):
                made[f"{part}-{number}/{name}"] = [_row(item, number, rng) for item in items]
    for part in ("base", "rows"):
        rng = random.Random(f"{part} {seed}")
        drawn = _draw(pools, part, settings[part])
        shared = part == "base" or settings.get("shared", False)
        if shared:
            drawn = [item for name in pools for item in _paired(drawn, name)]
        if shared and part == "rows":  # a row of SQuAD asks more than one of its questions
            own = [item for item in drawn if item.example.kind == "squad"]
            left = {id(item) for item in own[len(own) // (TURNS[part] + 1) :]}
            drawn = [item for item in drawn if id(item) not in left]
        rng.shuffle(drawn)
        rows = [_row(item, rng.randint(*settings["passages"]), rng) for item in drawn]
        made[part] = _ask_more(rows, _own(pools["squad"], part), TURNS[part]) if shared else rows
        if any(_key(c) in seen for row in made[part] for c in row.chunks):
            raise AssertionError(f"{part} holds a passage of an evaluation question")
    counts = _write(made, output)
    counts |= {f"pool of {name}": len(pool) for name, pool in pools.items()}
    (output / "counts.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return counts


PLACES = ("first", "middle", "last")
"""Where the evidence stands among a fixed number of passages."""


def prepare_long(data: Path, output: Path, settings: dict) -> dict:
    """Writes ``long-N/SET.jsonl`` for many passages, and ``{first,middle,last}-N`` by place.

    The questions are those of ``test``. What a question's own record lacks comes from the passages
    of the set's other test questions, the hardest by BM25 first, without those that hold an answer.

    Args:
        data: Folder of the question sets.
        output: Folder to write to.
        settings: As for `prepare`, and in ``long``: numbers of ``passages``, the one for ``place``,
            the most ``characters`` of a context, which may hold fewer passages then, and a
            ``limit`` of questions a set.
    """
    own, seed = settings["long"], settings["prepare"]["seed"]
    sets = _split(data, random.Random(f"split {seed}"))[1]["test"]
    made: dict[str, list[RagExample]] = {}
    for name, items in sets.items():
        found = dict.fromkeys(c for i in items for c in (*i.example.chunks, *i.others))
        index = _Index([c for c in found if len(c.text) <= settings["prepare"]["longest"]])
        wide = [_widened(item, index, max(*own["passages"], own["place"])) for item in items]
        wide = [_within(item, own["characters"]) for item in wide[: own["limit"]]]
        rng = random.Random(f"long {name} {seed}")
        for number in own["passages"]:
            made[f"long-{number}/{name}"] = [_row(item, number, rng) for item in wide]
        for place in PLACES:
            rows = [_row(item, own["place"], rng, place) for item in wide]
            made[f"{place}-{own['place']}/{name}"] = rows
    return _write(made, output)


def _widened(item: Item, index: _Index, number: int) -> Item:
    """The item with more other passages, of which none holds an answer."""
    known = {_key(chunk) for chunk in (*item.example.chunks, *item.others)}
    answers = [a.lower() for a in item.example.answers if len(a) > 3]
    more = [c for c in index.best(item.example.question, 3 * number) if _key(c) not in known]
    more = [c for c in more if not any(answer in c.text.lower() for answer in answers)]
    return Item(item.example, [*item.others, *more])


def _within(item: Item, characters: int) -> Item:
    """The item with as many of its other passages as fit."""
    left, kept = characters - sum(len(c.text) for c in item.example.chunks), []
    for chunk in item.others:
        left -= len(chunk.text)
        if left < 0:
            break
        kept.append(chunk)
    return Item(item.example, kept)


def _write(made: dict[str, list[RagExample]], output: Path) -> dict[str, int]:
    for name, rows in made.items():
        path = output / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
    return {name: len(rows) for name, rows in made.items()}


def _split(data: Path, rng: random.Random) -> tuple[dict, dict]:
    """Set -> training items, and part -> set -> evaluation items."""
    pools, parts = {}, {"choice": {}, "test": {}}
    for name, dev_file in DEV_FILES.items():
        dev = _items(_read(data / dev_file, name), name)
        train = _items([e for file in FILES[name] for e in _read(data / file, name)], name)
        rng.shuffle(dev)
        if name == "squad":  # the questions to choose by are of other articles than the tables'
            apart = set(sorted({item.example.chunks[0].title for item in dev})[::8])
            later = [item for item in dev if item.example.chunks[0].title in apart]
            dev = [item for item in dev if item.example.chunks[0].title not in apart]
        else:
            later = [i for i in train if "_dev" in i.example.meta["file"] and len(i.others) > 5]
            rng.shuffle(later)
            wanted = max(0, TEST[name] - len(dev))
            held = {id(item) for item in later[: CHOICE + wanted]}
            dev += later[CHOICE : CHOICE + wanted]
            train = [item for item in train if id(item) not in held]
        rng.shuffle(train)
        parts["choice"][name], parts["test"][name] = later[:CHOICE], dev[: TEST[name]]
        if name in MIXTURE:
            pools[name] = train
    return pools, parts


def _read(path: Path, name: str) -> list[RagExample]:
    """Questions with answers and marked evidence; ``meta['file']`` says where one is from."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        found = [_parse(r) for r in records if all(c["text"].strip() for c in r["chunks"])]
    else:
        found = load_examples(str(path))
    asked = [e for e in found if e.answers and e.supporting]
    return [replace(e, meta={"file": path.name}, kind=name) for e in asked]


def _parse(record: dict) -> RagExample:
    return RagExample(
        question=record["question"].strip(),
        chunks=tuple(Chunk(c["text"].strip(), c["title"] or None) for c in record["chunks"]),
        answers=tuple(answer for answer in record["answers"] if answer.strip()),
        supporting=tuple(record["supporting"]),
        id=record["id"],
    )


def _items(examples: Sequence[RagExample], name: str) -> list[Item]:
    """Each question once; its own other passages, or those of its article, in order of BM25."""
    articles: dict[str | None, dict[str, Chunk]] = defaultdict(dict)
    for e in examples if name == "squad" else ():
        articles[e.chunks[0].title][e.chunks[0].text] = e.chunks[0]
    indices = {title: _Index(list(found.values())) for title, found in articles.items()}
    found = {}
    for e in examples:
        gold = dict.fromkeys(e.chunks[i] for i in e.supporting)
        texts = {chunk.text for chunk in gold}
        if name == "squad":
            # Another passage of the article that holds an answer would be evidence, too.
            answers = [answer.lower() for answer in e.answers]
            ranked = indices[e.chunks[0].title].best(e.question)
            others = [c for c in ranked if not any(a in c.text.lower() for a in answers)]
        else:
            own = [c for c in e.chunks if c.text not in texts]
            others = _Index(own).best(e.question) if own else []
        others = [c for c in others if c.text not in texts]
        if len(gold) + len(others) > 4:
            alone = replace(e, chunks=tuple(gold), supporting=tuple(range(len(gold))))
            found[e.question.lower()] = Item(replace(alone, response=None), others)
    return list(found.values())


class _Index:
    """BM25 over passages; the order of equal scores is that of the passages."""

    def __init__(self, chunks: list[Chunk]):
        self.chunks, self.bm25 = chunks, bm25s.BM25()
        texts = [f"{c.title or ''} {c.text}" for c in chunks]
        self.bm25.index(_words(texts), show_progress=False)

    def best(self, question: str, most: int = 30) -> list[Chunk]:
        words = _words([question], return_ids=False)[0]
        scores = self.bm25.get_scores(words) if words else np.zeros(len(self.chunks))
        return [self.chunks[i] for i in np.argsort(-scores, kind="stable")[:most]]


def _words(texts: list[str], return_ids: bool = True):
    return bm25s.tokenize(
        texts, stopwords="en", return_ids=return_ids, show_progress=False, allow_empty=True
    )


def _key(chunk: Chunk) -> str:
    """Equal for passages that say the same, whatever their spacing and case."""
    return re.sub(r"\W+", "", chunk.text.lower())[:160]


def _trainable(pool: list[Item], seen: set[str], longest: int) -> list[Item]:
    """Training items without long passages and without those of evaluation questions."""

    def is_fit(chunk: Chunk) -> bool:
        return len(chunk.text) <= longest and _key(chunk) not in seen

    kept = [item for item in pool if all(map(is_fit, item.example.chunks))]
    fit = [Item(item.example, [c for c in item.others if is_fit(c)]) for item in kept]
    return [item for item in fit if len(item.example.chunks) + len(item.others) > 2]


def _draw(pools: dict[str, list[Item]], part: str, number: int) -> list[Item]:
    """Items by the mixture; SQuAD fills up what a small set lacks. Base and rows share none."""
    found: list[Item] = []
    for name in sorted(MIXTURE, key=lambda n: len(pools[n])):
        own = _own(pools[name], part)
        wanted = number - len(found) if name == "squad" else round(number * MIXTURE[name])
        found += own[:wanted]
    return found


def _own(pool: list[Item], part: str) -> list[Item]:
    """The questions of a set that a part may use."""
    border = int(len(pool) * BASE_SHARE)
    return pool[:border] if part == "base" else pool[border:]


def _paired(items: list[Item], name: str) -> list[Item]:
    """The items of a set; of the multi-hop sets two share a context and are asked in turn.

    Both bring their gold passages and their hardest other one, so that a question costs fewer
    tokens than alone. Questions of SQuAD share contexts by `_ask_more`.
    """
    own = [item for item in items if item.example.kind == name]
    if name == "squad":
        return own
    found = []
    for (a, others_a), (b, others_b) in zip(own[::2], own[1::2], strict=False):
        chunks = tuple(dict.fromkeys((*a.chunks, *others_a[:1], *b.chunks, *others_b[:1])))
        turns = ((b.question, b.answers[0]),)
        # All are marked as evidence, so that none is left out: each is that or its hardest rival.
        places = tuple(range(len(chunks)))
        found.append(Item(replace(a, chunks=chunks, supporting=places, followups=turns), []))
    return found


def _ask_more(rows: list[RagExample], squad: list[Item], most: int) -> list[RagExample]:
    """Asks more questions about the passages of a row, as later turns: they cost few tokens."""
    by_text: dict[str, list[RagExample]] = defaultdict(list)
    for item in squad:
        by_text[item.example.chunks[0].text].append(item.example)
    found = []
    for row in rows:
        own = [e for c in row.chunks for e in by_text[c.text][:4] if e.question != row.question]
        turns = tuple((e.question, e.answers[0]) for e in own[:most])
        found.append(replace(row, followups=row.followups or turns))
    return found


def _row(item: Item, number: int, rng: random.Random, place: str | None = None) -> RagExample:
    """The question over its gold passages and the hardest others, in a drawn order.

    With a ``place`` the gold passages stand there, together.
    """
    gold = item.example.chunks
    chunks = [*gold, *item.others[: max(0, number - len(gold))]]
    order = rng.sample(range(len(chunks)), len(chunks))
    if place is not None:
        others = [i for i in order if i >= len(gold)]
        start = PLACES.index(place) * len(others) // 2
        order = [*others[:start], *(i for i in order if i < len(gold)), *others[start:]]
    places = tuple(sorted(order.index(i) for i in item.example.supporting))
    return replace(item.example, chunks=tuple(chunks[i] for i in order), supporting=places)
