"""Prepares real questions for training and evaluation: splits, hard distractors, no leaks.

Reads public data sets from a folder (see README.md for their names on the Hub) and writes JSON
lines that `load_examples` reads. All random choices depend on one seed.
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
"""Files of training questions. Files with `_dev` in the name fill up the evaluation sets."""
DEV_FILES = {
    "hotpotqa": "hotpotqa_dev200.json",
    "2wiki": "2wikimultihopqa_dev200.json",
    "squad": "more/squad11_dev_minus_xquad.jsonl.gz",
    "musique": "musique_dev200.json",
}
CHOICE, TEST = 60, {"hotpotqa": 300, "2wiki": 200, "musique": 287, "squad": 500}
"""Number of questions per data set: for choosing settings, and for the tables."""
MIXTURE = {"hotpotqa": 0.45, "2wiki": 0.15, "squad": 0.40}
"""Shares of the data sets in the training rows. MuSiQue is not used for training."""
BASE_SHARE = 0.4
"""Share of each data set's training questions that the RAG base gets; the recipes get the rest."""
TURNS = {"base": 9, "rows": 4}
"""Maximum number of follow-up questions per row, if a row asks several questions."""


class Item(NamedTuple):
    """A question over its gold passages, and its distractors."""

    example: RagExample
    others: list[Chunk]  # distractors, the hardest first


def prepare(data: Path, output: Path, settings: dict) -> dict:
    """Writes ``{choice,test}-{5,10}/SET.jsonl``, ``base.jsonl`` and ``rows.jsonl``.

    The first N lines of ``rows.jsonl`` are a valid smaller training set. ``rows.jsonl`` and
    ``base.jsonl`` share no question, and neither contains a passage of an evaluation question.

    Args:
        data: Folder of the data sets.
        output: Folder to write to.
        settings: Numbers of questions for the recipes (``rows``) and the ``base``, minimum and
            maximum number of ``passages`` per row, length of the ``longest`` passage in characters,
            and ``seed``. With ``shared``, rows of the recipes also ask several questions.

    Returns:
        Number of examples written by file, and sizes of the pools; also in ``counts.json``.
    """
    seed = settings["seed"]
    pools, evaluation = _split(data, random.Random(f"split {seed}"))
    held_out = [item for sets in evaluation.values() for items in sets.values() for item in items]
    seen = {_key(c) for item in held_out for c in (*item.example.chunks, *item.others)}
    pools = {name: _trainable(pool, seen, settings["longest"]) for name, pool in pools.items()}
    files = {}
    for part, sets in evaluation.items():
        for name, items in sets.items():
            rng = random.Random(f"{part} {name} {seed}")
            for number in (5, 10):
                files[f"{part}-{number}/{name}"] = [_row(item, number, rng) for item in items]
    for part in ("base", "rows"):
        rng = random.Random(f"{part} {seed}")
        drawn = _draw(pools, part, settings[part])
        shared = part == "base" or settings.get("shared", False)
        if shared:
            drawn = [item for name in pools for item in _paired(drawn, name)]
        if shared:  # fewer SQuAD rows, since each asks several questions
            squad = [item for item in drawn if item.example.kind == "squad"]
            surplus = {id(item) for item in squad[len(squad) // (TURNS[part] + 1) :]}
            drawn = [item for item in drawn if id(item) not in surplus]
        rng.shuffle(drawn)
        rows = [_row(item, rng.randint(*settings["passages"]), rng) for item in drawn]
        files[part] = _ask_more(rows, _own(pools["squad"], part), TURNS[part]) if shared else rows
        if any(_key(c) in seen for row in files[part] for c in row.chunks):
            raise AssertionError(f"{part} holds a passage of an evaluation question")
    counts = _write(files, output)
    counts |= {f"pool of {name}": len(pool) for name, pool in pools.items()}
    (output / "counts.json").write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    return counts


PLACES = ("first", "middle", "last")
"""Positions of the evidence among the passages."""


def prepare_long(data: Path, output: Path, settings: dict) -> dict:
    """Writes ``long-N/SET.jsonl`` with N passages, and ``{first,middle,last}-N`` by place.

    The questions are those of ``test``. Missing distractors are passages of other test questions of
    the data set, the hardest by BM25 first, without those that contain an answer.

    Args:
        data: Folder of the data sets.
        output: Folder to write to.
        settings: All settings. ``long`` holds the numbers of ``passages``, their number for
            ``place``, the maximum ``characters`` of a context, which may lower the number of
            passages, and the ``limit`` of questions per data set.
    """
    long, seed = settings["long"], settings["prepare"]["seed"]
    sets = _split(data, random.Random(f"split {seed}"))[1]["test"]
    files: dict[str, list[RagExample]] = {}
    for name, items in sets.items():
        passages = dict.fromkeys(c for i in items for c in (*i.example.chunks, *i.others))
        index = _Index([c for c in passages if len(c.text) <= settings["prepare"]["longest"]])
        wide = [_widened(item, index, max(*long["passages"], long["place"])) for item in items]
        wide = [_within(item, long["characters"]) for item in wide[: long["limit"]]]
        rng = random.Random(f"long {name} {seed}")
        for number in long["passages"]:
            files[f"long-{number}/{name}"] = [_row(item, number, rng) for item in wide]
        for place in PLACES:
            rows = [_row(item, long["place"], rng, place) for item in wide]
            files[f"{place}-{long['place']}/{name}"] = rows
    return _write(files, output)


def _widened(item: Item, index: _Index, number: int) -> Item:
    """Adds distractors from the index, none of which contains an answer."""
    known = {_key(chunk) for chunk in (*item.example.chunks, *item.others)}
    answers = [a.lower() for a in item.example.answers if len(a) > 3]
    more = [c for c in index.best(item.example.question, 3 * number) if _key(c) not in known]
    more = [c for c in more if not any(answer in c.text.lower() for answer in answers)]
    return Item(item.example, [*item.others, *more])


def _within(item: Item, characters: int) -> Item:
    """Keeps as many distractors as fit into a number of characters."""
    left, kept = characters - sum(len(c.text) for c in item.example.chunks), []
    for chunk in item.others:
        left -= len(chunk.text)
        if left < 0:
            break
        kept.append(chunk)
    return Item(item.example, kept)


def _write(files: dict[str, list[RagExample]], output: Path) -> dict[str, int]:
    for name, rows in files.items():
        path = output / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = [json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows]
        path.write_text("".join(lines), encoding="utf-8")
    return {name: len(rows) for name, rows in files.items()}


def _split(data: Path, rng: random.Random) -> tuple[dict, dict]:
    """Returns data set -> training items, and part -> data set -> evaluation items."""
    pools, parts = {}, {"choice": {}, "test": {}}
    for name, dev_file in DEV_FILES.items():
        dev = _items(_read(data / dev_file, name), name)
        train = _items([e for file in FILES[name] for e in _read(data / file, name)], name)
        rng.shuffle(dev)
        if name == "squad":  # choice and test have no article in common
            titles = set(sorted({item.example.chunks[0].title for item in dev})[::8])
            choice = [item for item in dev if item.example.chunks[0].title in titles]
            dev = [item for item in dev if item.example.chunks[0].title not in titles]
        else:
            choice = [i for i in train if "_dev" in i.example.meta["file"] and len(i.others) > 5]
            rng.shuffle(choice)
            lacking = max(0, TEST[name] - len(dev))
            taken = {id(item) for item in choice[: CHOICE + lacking]}
            dev += choice[CHOICE : CHOICE + lacking]
            train = [item for item in train if id(item) not in taken]
        rng.shuffle(train)
        parts["choice"][name], parts["test"][name] = choice[:CHOICE], dev[: TEST[name]]
        if name in MIXTURE:
            pools[name] = train
    return pools, parts


def _read(path: Path, name: str) -> list[RagExample]:
    """Reads the questions that have answers and marked evidence; ``meta['file']`` is the file."""
    if path.suffix == ".gz":
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            records = [json.loads(line) for line in lines]
        examples = [_parse(r) for r in records if all(c["text"].strip() for c in r["chunks"])]
    else:
        examples = load_examples(str(path))
    usable = [e for e in examples if e.answers and e.supporting]
    return [replace(e, meta={"file": path.name}, kind=name) for e in usable]


def _parse(record: dict) -> RagExample:
    return RagExample(
        question=record["question"].strip(),
        chunks=tuple(Chunk(c["text"].strip(), c["title"] or None) for c in record["chunks"]),
        answers=tuple(answer for answer in record["answers"] if answer.strip()),
        supporting=tuple(record["supporting"]),
        id=record["id"],
    )


def _items(examples: Sequence[RagExample], name: str) -> list[Item]:
    """Makes an item of each distinct question; distractors are of its record, or SQuAD article."""
    articles: dict[str | None, dict[str, Chunk]] = defaultdict(dict)
    for e in examples if name == "squad" else ():
        articles[e.chunks[0].title][e.chunks[0].text] = e.chunks[0]
    indices = {title: _Index(list(texts.values())) for title, texts in articles.items()}
    items = {}
    for e in examples:
        gold = dict.fromkeys(e.chunks[i] for i in e.supporting)
        texts = {chunk.text for chunk in gold}
        if name == "squad":
            # Another passage of the article that contains an answer would be evidence, too.
            answers = [answer.lower() for answer in e.answers]
            ranked = indices[e.chunks[0].title].best(e.question)
            others = [c for c in ranked if not any(a in c.text.lower() for a in answers)]
        else:
            own = [c for c in e.chunks if c.text not in texts]
            others = _Index(own).best(e.question) if own else []
        others = [c for c in others if c.text not in texts]
        if len(gold) + len(others) > 4:
            gold_only = replace(e, chunks=tuple(gold), supporting=tuple(range(len(gold))))
            items[e.question.lower()] = Item(replace(gold_only, response=None), others)
    return list(items.values())


class _Index:
    """BM25 index over passages. Ties are in the order of the passages."""

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
    """Key that is equal for passages with the same words, regardless of spacing and case."""
    return re.sub(r"\W+", "", chunk.text.lower())[:160]


def _trainable(pool: list[Item], seen: set[str], longest: int) -> list[Item]:
    """Filters training items: drops long passages and passages of evaluation questions."""

    def is_fit(chunk: Chunk) -> bool:
        return len(chunk.text) <= longest and _key(chunk) not in seen

    kept = [item for item in pool if all(map(is_fit, item.example.chunks))]
    fit = [Item(item.example, [c for c in item.others if is_fit(c)]) for item in kept]
    return [item for item in fit if len(item.example.chunks) + len(item.others) > 2]


def _draw(pools: dict[str, list[Item]], part: str, number: int) -> list[Item]:
    """Takes items by `MIXTURE`; SQuAD fills gaps of small sets. Base and rows share no item."""
    drawn: list[Item] = []
    for name in sorted(MIXTURE, key=lambda n: len(pools[n])):
        wanted = number - len(drawn) if name == "squad" else round(number * MIXTURE[name])
        drawn += _own(pools[name], part)[:wanted]
    return drawn


def _own(pool: list[Item], part: str) -> list[Item]:
    """The items of a data set that are reserved for a part."""
    border = int(len(pool) * BASE_SHARE)
    return pool[:border] if part == "base" else pool[border:]


def _paired(items: list[Item], name: str) -> list[Item]:
    """The items of a data set; those of multi-hop sets are paired: two questions, one context.

    The context holds the gold passages and the hardest distractor of both, so that a question costs
    fewer tokens than alone. Questions of SQuAD share contexts by `_ask_more`.
    """
    of_set = [item for item in items if item.example.kind == name]
    if name == "squad":
        return of_set
    pairs = []
    for (a, others_a), (b, others_b) in zip(of_set[::2], of_set[1::2], strict=False):
        chunks = tuple(dict.fromkeys((*a.chunks, *others_a[:1], *b.chunks, *others_b[:1])))
        turns = ((b.question, b.answers[0]),)
        # All chunks are marked as evidence, so that none is dropped.
        places = tuple(range(len(chunks)))
        pairs.append(Item(replace(a, chunks=chunks, supporting=places, followups=turns), []))
    return pairs


def _ask_more(rows: list[RagExample], squad: list[Item], most: int) -> list[RagExample]:
    """Adds SQuAD questions about the passages of a row as later turns, which cost few tokens."""
    by_text: dict[str, list[RagExample]] = defaultdict(list)
    for item in squad:
        by_text[item.example.chunks[0].text].append(item.example)
    extended = []
    for row in rows:
        more = [e for c in row.chunks for e in by_text[c.text][:4] if e.question != row.question]
        turns = tuple((e.question, e.answers[0]) for e in more[:most])
        extended.append(replace(row, followups=row.followups or turns))
    return extended


def _row(item: Item, number: int, rng: random.Random, place: str | None = None) -> RagExample:
    """Makes a row of the gold passages and the hardest distractors, in random order.

    With ``place``, the gold passages are together at that place.
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
