"""A prompt for people to read: what each row is, and its text."""

from __future__ import annotations

from itertools import groupby

from transformers import PreTrainedTokenizerBase

from blocktune.layout import GLOBAL, NO_CHUNK, Kind
from blocktune.prompt.rows import Prompt


def show(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Decodes a prompt run by run, each under a line that says what its rows are.

    Learned tokens have no text; they are written as ``<link 0>``. Pads are left out.
    """
    layout = prompt.layout
    facts = zip(
        layout.sample[0].tolist(),
        layout.kind[0].tolist(),
        layout.chunk[0].tolist(),
        layout.group[0].tolist(),
        layout.position[0].tolist(),
        layout.offset[0].tolist(),
        prompt.ids,
        strict=True,
    )
    runs = groupby(facts, key=lambda fact: fact[:4])
    return "\n".join(_run(tokenizer, key, list(rows)) for key, rows in runs if key[1] != Kind.PAD)


def _run(tokenizer, key: tuple[int, int, int, int], rows: list[tuple[int, ...]]) -> str:
    sample, kind, chunk, group = key
    name = Kind(kind).name.lower() + (f" {chunk}" if chunk != NO_CHUNK else "")
    name = f"sample {sample}, {name}" if sample else name
    sees = "sees all before" if group == GLOBAL else "sees itself"
    sees = "hidden from others" if kind == Kind.GHOST else sees
    title = f"[{name}: {len(rows)} tokens at positions {rows[0][4]}-{rows[-1][4]}, {sees}]"
    if kind in (Kind.LINK, Kind.WRAP):
        return title + "\n" + "".join(f"<{Kind(kind).name.lower()} {row[5]}>" for row in rows)
    return f"{title}\n{tokenizer.decode([row[6] for row in rows])}"
