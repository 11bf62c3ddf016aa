"""Exact match of greedy decoding on generated worlds, with and without the needed context."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from blocktune.attention import dense_mask
from blocktune.data.example import RagExample
from blocktune.data.worlds import MARKER
from blocktune.prompt import LayoutSpec, Prompt, PromptFormat, lay_out, make_pieces, stack

SETTINGS = ("full", "naive", "no-context", "bridge-deleted")
"""Full attention; chunks encoded separately; no chunks; without the chunk of the last hop."""


def prompt_for(tokenizer: PreTrainedTokenizerBase, example: RagExample, setting: str) -> Prompt:
    """Lays out a question in one of the `SETTINGS`.

    Raises:
        ValueError: If the setting is unknown.
    """
    if setting not in SETTINGS:
        raise ValueError(f"unknown setting '{setting}'; available: {', '.join(SETTINGS)}")
    chunks = list(example.chunks)
    if setting == "bridge-deleted":
        del chunks[example.meta["fact_chunks"][-1]]
    pieces = make_pieces(tokenizer, PromptFormat(), chunks, example.question)
    if setting == "no-context":
        pieces = pieces._replace(chunks=())
    return lay_out(pieces, LayoutSpec(block=setting == "naive"))


@torch.no_grad()
def greedy(
    model: PreTrainedModel, prompts: Sequence[Prompt], pad_id: int, eos_id: int, limit: int = 24
) -> list[list[int]]:
    """Generates greedily from a batch of prompts with the masks of their layouts.

    Args:
        model: A stock model with ``sdpa`` attention.
        prompts: Laid-out prompts, without answers.
        pad_id: Id of padding tokens.
        eos_id: Id that ends an answer; not returned.
        limit: Maximum number of new tokens.
    """
    batch = stack(prompts, pad_id).to(model.device)
    last = (~batch.layout.is_pad).sum(1, keepdim=True) - 1  # row that each answer follows
    visible = ~batch.layout.is_pad[:, None, None]  # (B, 1, 1, S): new tokens see all rows
    mask = dense_mask(batch.layout) | torch.eye(
        batch.layout.num_rows, dtype=torch.bool, device=model.device
    )
    cache, ids, position = DynamicCache(), batch.input_ids, batch.layout.position
    new: list[Tensor] = []
    while len(new) < limit:
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache,
            use_cache=True,
        )  # fmt: skip
        ids = out.logits.argmax(-1).gather(1, last)
        new.append(ids)
        if all((torch.cat(new, 1) == eos_id).any(1)):
            break
        visible = torch.nn.functional.pad(visible, (0, 1), value=True)
        mask, position = visible, position.gather(1, last) + 1
        last = torch.zeros_like(last)
    rows = torch.cat(new, 1).tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def is_correct(text: str, example: RagExample) -> bool:
    """Whether the text after the last answer marker is an accepted answer."""
    return text.split(MARKER.strip())[-1].strip() in example.answers


def correct(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[RagExample],
    setting: str,
    batch_size: int = 32,
) -> list[bool]:
    """Answers all examples greedily; returns whether each answer is correct."""
    prompts = [prompt_for(tokenizer, example, setting) for example in examples]
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i].ids))
    right = [False] * len(prompts)
    for start in range(0, len(order), batch_size):
        picked = order[start : start + batch_size]
        replies = greedy(
            model, [prompts[i] for i in picked], tokenizer.pad_token_id, tokenizer.eos_token_id
        )
        for i, reply in zip(picked, replies, strict=True):
            right[i] = is_correct(tokenizer.decode(reply, skip_special_tokens=True), examples[i])
    return right


def by_kind(examples: Iterable[RagExample], right: Iterable[bool]) -> dict[str, dict[str, float]]:
    """Exact match by kind and sub-kind: ``{"cross-chunk/alias": {"n": 90, "em": 0.91}, ...}``."""
    groups: dict[str, list[bool]] = {}
    for example, ok in zip(examples, right, strict=True):
        for name in groups_of(example):
            groups.setdefault(name, []).append(ok)
    return {
        name: {"n": len(oks), "em": round(sum(oks) / len(oks), 4)}
        for name, oks in sorted(groups.items())
    }


def groups_of(example: RagExample) -> list[str]:
    """The kind, and for some kinds also a sub-kind by how its facts mention their subject."""
    mentions = example.meta["mentions"]
    if example.kind == "cross-chunk":
        return [example.kind, f"{example.kind}/{mentions[0]}"]
    if example.kind == "2-hop":
        titled = all(mention == "name" for mention in mentions)
        return [example.kind, f"{example.kind}/{'titled' if titled else 'continued'}"]
    return [example.kind]


def chance(examples: Iterable[RagExample]) -> float:
    """Upper bound on the exact match of guessing without the last hop's chunk.

    A guesser could only name a value of the same relation from another chunk. The bound is the
    share of examples whose answer still occurs elsewhere in the context.
    """
    occurs = []
    for example in examples:
        removed = example.meta["fact_chunks"][-1]
        others = [chunk for i, chunk in enumerate(example.chunks) if i != removed]
        occurs.append(any(example.answers[0] in f"{c.title}\n{c.text}" for c in others))
    return sum(occurs) / max(1, len(occurs))
