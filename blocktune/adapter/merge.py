"""Merging an adapter into its base: one folder that needs no PEFT, compared with the adapter."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from blocktune.adapter import OWN_WEIGHTS, AdapterInfo, load_adapter
from blocktune.adapter.load import load_model
from blocktune.adapter.scope import require_mergeable
from blocktune.links import add_link_tokens, load_links, save_links
from blocktune.models.identity import base_fingerprint, tokenizer_hash
from blocktune.models.load import adapter_folder, load_base

PROBE = (
    "Aldermere is a harbour city, founded in 1204 by fishermen from the coast.",
    "Norwick lies inland, two days from Aldermere; the town was founded in 1310.",
    "Which of the two cities was founded first, and by whom?",
)
"""Texts that merged and unmerged model are compared on, with the learned tokens between them."""


@dataclass(frozen=True)
class MergeReport:
    """What was merged and how far the saved model is from the adapter on its base."""

    output: str  # the merged model's folder
    link_mode: str | None  # of the learned tokens; None if there are none
    quantization: str | None  # of the base in training; the merged weights are plain
    max_abs_logit: float  # largest logit of the probe, the scale of the differences
    max_abs_diff: float  # largest difference of logits from the adapter on its base
    same_top1: float  # share of the probe's rows with the same most likely token
    requantised_max_abs_diff: float | None = None  # merged, then quantised as the base was


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    links: str | None = None,
) -> MergeReport:
    """Writes base and adapter as one model, reads it back and compares.

    A base that was quantised in training is quantised and dequantised, and LoRA is added to the
    result, since LoRA was trained on that.

    Args:
        adapter: Folder, or repository of the Hub.
        output: New or empty folder; serves as ``--model`` and as ``--adapter``.
        model: The base; None: the one that the adapter names.
        dtype: Dtype of the merged weights; ``auto``: as the base is saved.
        device: Where to compute.
        links: ``table`` beside the model, or ``added_tokens`` in its vocabulary; None: as trained.

    Raises:
        ValueError: If the output is not empty, or this adapter cannot be merged so.
    """
    folder, output = adapter_folder(adapter), Path(output)
    info = AdapterInfo.load(folder)
    _check(info, folder, output, links)
    plain = {"dtype": dtype, "device": device}
    options = plain | {"revision": None if model else info.base_revision}
    name = model or info.base_model
    wanted = _wanted_logits(name, folder, info.quantization, options)
    _write(name, folder, output, info, links or info.link_mode, options)
    got = _logits(*load_model(adapter=output, **plain)[:3], wanted.shape[-1])
    again = None
    if info.quantization is not None:
        coded = load_model(adapter=output, quantize=info.quantization, **plain)
        again = float((_logits(*coded[:3], wanted.shape[-1]) - wanted).abs().max())
    return MergeReport(
        output=str(output),
        link_mode=(links or info.link_mode) if info.num_learned else None,
        quantization=info.quantization,
        max_abs_logit=float(wanted.abs().max()),
        max_abs_diff=float((got - wanted).abs().max()),
        same_top1=float((got.argmax(-1) == wanted.argmax(-1)).float().mean()),
        requantised_max_abs_diff=again,
    )


def _check(info: AdapterInfo, folder: Path, output: Path, links: str | None) -> None:
    if info.base_model == OWN_WEIGHTS:
        raise ValueError(f"'{folder}' is a whole model already; there is nothing to merge")
    require_mergeable(info.scope)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"'{output}' is not empty; name a new folder for the merged model")
    if links not in (None, "table", "added_tokens"):
        raise ValueError(f"links must be 'table' or 'added_tokens', got '{links}'")
    if links == "table" and info.num_learned and info.link_mode == "added_tokens":
        raise ValueError(
            "this adapter's link tokens were trained in the vocabulary; leave --links out"
        )


@torch.no_grad()
def _wanted_logits(name, folder, quantization, options) -> Tensor:
    base, tokenizer = load_base(name, quantize=quantization, **options)
    # Rows beyond the tokenizer's vocabulary are unused; added link tokens may take them.
    vocab_size = min(len(tokenizer), base.config.get_text_config().vocab_size)
    model, info = load_adapter(base, tokenizer, folder)
    return _logits(model, tokenizer, info, vocab_size)


def _write(name, folder, output, info: AdapterInfo, link_mode: str, options) -> None:
    base, tokenizer = load_base(name, quantize=info.quantization, **options)
    if info.quantization is not None:
        base = base.dequantize(dtype=base.dtype)
    model, _ = load_adapter(base, tokenizer, folder, merge=True, links=False)
    output.mkdir(parents=True, exist_ok=True)
    if info.has_table:
        table = load_links(folder)
        if link_mode == "table":
            save_links(table, output)
        else:
            add_link_tokens(model, tokenizer, info.num_learned, rows=table.weight.data)
    model.save_pretrained(output)
    tokenizer.save_pretrained(output)
    origin = {"started_from": info.base_model, "merged_on": info.quantization}
    merged = replace(
        info,
        base_model=OWN_WEIGHTS,
        base_revision=None,
        base_fingerprint=base_fingerprint(model),
        tokenizer_hash=tokenizer_hash(tokenizer),
        quantization=None,
        link_mode=link_mode,
        training={**info.training, **origin},
    )
    merged.save(output)


@torch.no_grad()
def _logits(model, tokenizer, info: AdapterInfo, vocab_size: int) -> Tensor:
    """Logits of the probe under the model's own causal attention, ``(1, S, V)`` float32."""
    first = info.link_base(model, tokenizer)
    learned = [] if first is None else list(range(first, first + info.num_learned))
    ids: list[int] = []
    for text in PROBE:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + learned
    rows = torch.tensor([ids], device=model.device)
    return model(rows, use_cache=False).logits[..., :vocab_size].float().cpu()
