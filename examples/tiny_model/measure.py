"""Greedy exact match on generated worlds, with and without what the answer needs."""

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
"""Full attention; chunks encoded alone; no chunks; the chunk of the last hop's fact taken out."""


def prompt_for(tokenizer: PreTrainedTokenizerBase, example: RagExample, setting: str) -> Prompt:
    """Lays one question out as a setting wants it.

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
    """Continues a batch of prompts greedily under their own visibility.

    Args:
        model: A stock model with ``sdpa`` attention.
        prompts: Laid-out prompts, without answers.
        pad_id: Id of pad rows.
        eos_id: Id that ends an answer; not returned.
        limit: Most new tokens.
    """
    batch = stack(prompts, pad_id, side="left")
    batch = batch.to(model.device)
    seen = ~batch.layout.is_pad[:, None, None]  # (B, 1, 1, S): all that is decoded sees all rows
    mask = dense_mask(batch.layout) | torch.eye(
        batch.layout.num_rows, dtype=torch.bool, device=model.device
    )
    cache, ids, position = DynamicCache(), batch.input_ids, batch.layout.position
    new: list[Tensor] = []
    while len(new) < limit:
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        ids = out.logits[:, -1].argmax(-1, keepdim=True)
        new.append(ids)
        if all((torch.cat(new, 1) == eos_id).any(1)):
            break
        seen = torch.nn.functional.pad(seen, (0, 1), value=True)
        mask, position = seen, position[:, -1:] + 1
    rows = torch.cat(new, 1).tolist()
    return [row[: row.index(eos_id)] if eos_id in row else row for row in rows]


def is_correct(text: str, example: RagExample) -> bool:
    """Whether what follows the last answer marker is exactly an accepted answer."""
    return text.split(MARKER.strip())[-1].strip() in example.answers


def correct(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[RagExample],
    setting: str,
    batch_size: int = 32,
) -> list[bool]:
    """Answers every example greedily and says which answers are right, in order."""
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
    """The kind, and for cross-chunk and chains where their facts stand."""
    mentions = example.meta["mentions"]
    if example.kind == "cross-chunk":
        return [example.kind, f"{example.kind}/{mentions[0]}"]
    if example.kind == "2-hop":
        titled = all(mention == "name" for mention in mentions)
        return [example.kind, f"{example.kind}/{'titled' if titled else 'continued'}"]
    return [example.kind]


def chance(examples: Iterable[RagExample]) -> float:
    """Exact match of a guesser who, the last hop's chunk being gone, knows the kind of answer.

    It names a value of the same relation that another chunk states, when there is one: the share
    of examples whose answer still occurs elsewhere in the context bounds it from above.
    """
    left = []
    for example in examples:
        gone = example.meta["fact_chunks"][-1]
        others = [chunk for i, chunk in enumerate(example.chunks) if i != gone]
        left.append(any(example.answers[0] in f"{c.title}\n{c.text}" for c in others))
    return sum(left) / max(1, len(left))
