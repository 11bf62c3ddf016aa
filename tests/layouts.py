"""Small layouts that use every feature of the rule, made row by row."""

from dataclasses import replace

import torch

from blocktune.layout import FOREVER, GLOBAL, NO_CHUNK, NO_ROW, Kind, Layout

FIELDS = (
    "kind",
    "chunk",
    "offset",
    "position",
    "order",
    "group",
    "sample",
    "supersedes",
    "until",
)
PAD_ROW = (Kind.PAD, NO_CHUNK, 0, 0, 0, GLOBAL, 0, NO_ROW, FOREVER)


def prompt(
    prefix=5,
    chunks=(20, 13, 1),
    query=9,
    *,
    links=0,
    blanks=0,
    parallel=False,
    groups=None,
    block=True,
    sample=0,
):
    """Rows of one prompt; ``groups`` is each chunk's group, ``block=False`` full attention."""
    groups = groups or range(len(chunks))
    life, order = (sample, NO_ROW, FOREVER), prefix
    rows = [(Kind.PREFIX, NO_CHUNK, i, i, i, GLOBAL, *life) for i in range(prefix)]
    for c, (length, group) in enumerate(zip(chunks, groups, strict=True)):
        group = group if block else GLOBAL
        start = prefix if parallel else order
        for g in range(blanks):
            at = (start - blanks + g, order - blanks + g)
            rows.append((Kind.BLANK, c, g, *at, group, *life))
        for i in range(length + links):
            linked = i >= length
            kind, own = (Kind.LINK, GLOBAL) if linked else (Kind.CHUNK, group)
            offset = i - length if linked else i
            rows.append((kind, c, offset, start + i, order + i, own, *life))
        order += length + links
    start = prefix + max(chunks) + links if parallel else order
    for i in range(query):
        rows.append((Kind.QUERY, NO_CHUNK, i, start + i, order + i, GLOBAL, *life))
    return rows


def freshen(rows, which, until=FOREVER):
    """Appends a fresh row for each index in ``which``."""
    originals = [(i, dict(zip(FIELDS, rows[i], strict=True))) for i in which]
    fresh = [
        tuple({**row, "group": GLOBAL, "supersedes": i, "until": until}.values())
        for i, row in originals
    ]
    return [*rows, *fresh]


def layout(*prompts, left=False) -> Layout:
    """One batch entry a prompt, padded right or left."""
    longest = max(map(len, prompts))
    padded = [pad(rows, longest, left) for rows in prompts]
    return Layout.unpack(torch.tensor(padded))


def pad(rows, length, left):
    missing = length - len(rows)
    if not left:
        return rows + [PAD_ROW] * missing
    moved = [(*row[:7], row[7] + missing if row[7] != NO_ROW else NO_ROW, row[8]) for row in rows]
    return [PAD_ROW] * missing + moved


def packed(*prompts):
    """Several prompts in one row; the order goes on, positions start again."""
    rows, order = [], 0
    for sample, part in enumerate(prompts):
        base = len(rows)
        for row in part:
            fields = dict(zip(FIELDS, row, strict=True))
            fields["order"] += order
            fields["sample"] = sample
            fields["supersedes"] += base if fields["supersedes"] != NO_ROW else 0
            rows.append(tuple(fields.values()))
        order = 1 + max(row[4] for row in rows)
    return rows


def shuffled(rows, seed=0):
    """The same rows in another sequence: no execution may rely on theirs."""
    sequence = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed)).tolist()
    place = {old: new for new, old in enumerate(sequence)}
    picked = [rows[i] for i in sequence]
    return [(*row[:7], place.get(row[7], NO_ROW), row[8]) for row in picked]


LAYOUTS = {
    "ragged": lambda: layout(prompt()),
    "links": lambda: layout(prompt(links=2), prompt(3, (7, 19), 4, links=1)),
    "blanks": lambda: layout(prompt(blanks=3)),
    "fresh": lambda: layout(freshen(prompt(links=1), (5, 6, 20, 28, 33, 39))),
    "until": lambda: layout(freshen(freshen(prompt(), range(5, 39, 2)), range(6, 39, 2), until=1)),
    "packed": lambda: layout(
        packed(
            prompt(4, (8, 5), 4), freshen(prompt(3, (11, 4, 3), 3), (4, 15)), prompt(0, (9,), 2)
        ),
        prompt(2, (30, 2), 5),
    ),
    "left": lambda: layout(freshen(prompt(), (8, 30)), prompt(1, (4, 9), 3), left=True),
    "parallel": lambda: layout(prompt(links=1, parallel=True)),
    "dropout": lambda: layout(prompt(5, (9, 14, 8, 6), 7, groups=(0, 1, 1, 0))),
    "full": lambda: layout(prompt(block=False), prompt(2, (5, 6), 3, block=False)),
    "blind": lambda: layout(prompt(0, (12, 20), 6)),
    "shuffled": lambda: layout(shuffled(freshen(prompt(links=2, blanks=2), (9, 30)))),
    "everything": lambda: layout(
        freshen(prompt(links=2, blanks=2), (9, 10, 11, 36)),
        packed(prompt(4, (8, 5), 4, links=1, blanks=1), freshen(prompt(3, (9, 4), 3), (6,))),
        left=True,
    ),
}


def random_layout(seed: int) -> Layout:
    """Rows as wild as the contract allows: several samples, ties, blanks, ends, any sequence."""
    draw = torch.Generator().manual_seed(seed)

    def pick(low, high):
        return int(torch.randint(low, high, (), generator=draw))

    def one():
        chunks = tuple(pick(1, 90) for _ in range(pick(1, 5)))
        groups = tuple(pick(0, len(chunks)) for _ in chunks)
        rows = prompt(
            pick(0, 9), chunks, pick(1, 40), links=pick(0, 3), blanks=pick(0, 3), groups=groups
        )
        tokens = [i for i, row in enumerate(rows) if row[0] == Kind.CHUNK]
        chosen = {tokens[pick(0, len(tokens))] for _ in range(pick(1, 12))}
        return freshen(rows, sorted(chosen), until=(FOREVER, 1)[pick(0, 2)])

    rows = [packed(*(one() for _ in range(pick(1, 4)))) for _ in range(2)]
    if pick(0, 2):
        rows = [shuffled(part, seed) for part in rows]
    return layout(*rows, left=bool(pick(0, 2)))


def mutate(some: Layout, row: tuple[int, int], **values) -> Layout:
    """The layout with fields of one row changed."""
    changes = {}
    for name, value in values.items():
        changes[name] = getattr(some, name).clone()
        changes[name][row] = value
    return replace(some, **changes)
