"""Batches of prompts: stacked with padding, or packed one after the other into one row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blocktune.layout import FOREVER, GLOBAL, NO_CHUNK, NO_ROW, Kind, Layout
from blocktune.prompt.rows import IGNORED, Prompt

_PAD_ROW = {"kind": int(Kind.PAD), "chunk": NO_CHUNK, "group": GLOBAL, "until": FOREVER}
_PAD_ROW |= {"supersedes": NO_ROW, "offset": 0, "position": 0, "order": 0, "sample": 0}


@dataclass(frozen=True)
class Batch:
    """Inputs of a forward pass, and labels for the loss; every tensor is ``(B, S)`` int64."""

    input_ids: Tensor
    layout: Layout
    labels: Tensor

    def to(self, device: torch.device | str) -> Batch:
        """Moves all tensors to a device."""
        return Batch(self.input_ids.to(device), self.layout.to(device), self.labels.to(device))


def stack(prompts: Sequence[Prompt], pad_id: int, multiple: int = 1) -> Batch:
    """Pads prompts to the longest, rounded up to a ``multiple``, one batch entry each.

    Pad rows of token ``pad_id``, which see nothing, come last.
    """
    if not prompts:
        raise ValueError("stack needs at least one prompt, got none")
    length = -(-max(len(prompt.input_ids) for prompt in prompts) // multiple) * multiple

    def padded(values: Tensor, fill: int) -> Tensor:
        missing = length - values.shape[-1]
        return torch.nn.functional.pad(values, (0, missing), value=fill) if missing else values

    def joined(name: str) -> Tensor:
        parts = [padded(getattr(prompt.layout, name), _PAD_ROW[name]) for prompt in prompts]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    rows = {field.name: joined(field.name) for field in fields(Layout)}
    ids = torch.stack([padded(prompt.input_ids, pad_id) for prompt in prompts])
    labels = torch.where(rows["kind"] == Kind.ANSWER, ids, IGNORED)
    return Batch(ids, Layout(**rows), labels)


def pack(prompts: Sequence[Prompt]) -> Prompt:
    """Joins prompts into one batch entry, in which they do not see each other.

    Every prompt keeps its positions; ``order`` continues, and ``sample`` numbers the prompts.
    """
    if not prompts:
        raise ValueError("pack needs at least one prompt, got none")
    layouts, row, order, sample = [], 0, 0, 0
    for prompt in prompts:
        layout = prompt.layout
        moved = torch.where(layout.is_fresh, layout.supersedes + row, layout.supersedes)
        shifted = {"order": layout.order + order, "sample": layout.sample + sample}
        layouts.append(replace(layout, supersedes=moved, **shifted))
        row += layout.num_rows
        order += int(layout.order.max()) + 1
        sample += int(layout.sample.max()) + 1
    rows = {f.name: torch.cat([getattr(p, f.name) for p in layouts], 1) for f in fields(Layout)}
    return Prompt(torch.cat([prompt.input_ids for prompt in prompts]), Layout(**rows))


def show(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> str:
    """Decodes a prompt run by run, each under a line that describes its rows. Skips padding."""
    names = ("sample", "kind", "chunk", "group", "position", "offset")
    columns = [getattr(prompt.layout, name)[0].tolist() for name in names]
    runs = groupby(zip(*columns, prompt.ids, strict=True), key=lambda row: row[:4])
    return "\n".join(_run(tokenizer, key, list(rows)) for key, rows in runs if key[1] != Kind.PAD)


def _run(tokenizer, key: tuple[int, int, int, int], rows: list[tuple[int, ...]]) -> str:
    sample, kind, chunk, group = key
    name = Kind(kind).name.lower() + (f" {chunk}" if chunk != NO_CHUNK else "")
    name = f"sample {sample}, {name}" if sample else name
    sees = "sees all before" if group == GLOBAL else "sees itself"
    sees = "hidden from others" if kind == Kind.BLANK else sees
    title = f"[{name}: {len(rows)} tokens at positions {rows[0][4]}-{rows[-1][4]}, {sees}]"
    if kind in (Kind.LINK, Kind.WRAP):
        return title + "\n" + "".join(f"<{Kind(kind).name.lower()} {row[5]}>" for row in rows)
    return f"{title}\n{tokenizer.decode([row[6] for row in rows])}"
