"""Merges an adapter into its base, to a folder that needs no PEFT, and compares the logits."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from blocktune.adapter import INFO_FILE, OWN_WEIGHTS, AdapterInfo, load_adapter
from blocktune.adapter.load import OWN_BASE, load_model, quantize_as_trained, unmergeable
from blocktune.adapter.scope import require_mergeable
from blocktune.files import move_entries
from blocktune.links import add_link_tokens, load_links, save_links
from blocktune.models.identity import base_fingerprint, tokenizer_hash
from blocktune.models.load import adapter_folder, load_base

PROBE = (  # texts to compare the models on, each followed by the learned tokens
    "Aldermere is a harbour city, founded in 1204 by fishermen from the coast.",
    "Norwick lies inland, two days from Aldermere; the town was founded in 1310.",
    "Which of the two cities was founded first, and by whom?",
)


@dataclass(frozen=True)
class MergeReport:
    """The result of a merge. Differences of logits are to the unmerged adapter, on `PROBE`."""

    output: str  # folder of the merged model
    link_mode: str | None  # of the learned tokens; None if there are none
    quantization: str | None  # of the base in training; the merged weights are not quantised
    max_abs_logit: float  # largest logit, for comparison with the differences
    max_abs_diff: float  # largest difference
    same_top1: float  # share of rows with the same most likely token
    requantised_max_abs_diff: float | None = None  # the same after quantising the merged model


def merge_adapter(
    adapter: str | Path,
    output: str | Path,
    *,
    model: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    links: str | None = None,
) -> MergeReport:
    """Writes base and adapter as one model, loads it and compares its logits.

    LoRA that was trained on a quantised base is added to the dequantised weights.

    Args:
        adapter: Folder, or repository of the Hub.
        output: New or empty folder, to be used as ``--model`` or ``--adapter``.
        model: The base; None: the one named by the adapter.
        dtype: Dtype of the merged weights; ``auto``: that of the saved base.
        device: Device to compute on.
        links: ``table`` beside the model, or ``added_tokens`` in its vocabulary; None: as trained.

    Raises ValueError if the output is not empty, or this adapter cannot be merged in this way.
    """
    folder, output = adapter_folder(adapter), Path(output)
    info = AdapterInfo.load(folder)
    _check(info, folder, output, links)
    loading = {"dtype": dtype, "device": device}
    name, revision = model or info.base_model, None if model else info.base_revision
    options = loading | {"revision": revision, "what": OWN_BASE.format(adapter)}
    options["quantize"] = quantize_as_trained(info, model)
    reference = _reference_logits(name, folder, options)
    if not reference.isfinite().all():
        raise ValueError(f"'{folder}' gives logits that are not numbers (NaN); train it again")
    _write(name, folder, output, info, links or info.link_mode, options)
    num_logits, difference = reference.shape[-1], None
    merged = _logits(*load_model(adapter=output, **loading)[:3], num_logits)
    if info.quantization is not None:
        quantised = load_model(adapter=output, quantize=info.quantization, **loading)
        difference = float((_logits(*quantised[:3], num_logits) - reference).abs().max())
    return MergeReport(
        output=str(output),
        link_mode=(links or info.link_mode) if info.num_learned else None,
        quantization=info.quantization,
        max_abs_logit=float(reference.abs().max()),
        max_abs_diff=float((merged - reference).abs().max()),
        same_top1=float((merged.argmax(-1) == reference.argmax(-1)).float().mean()),
        requantised_max_abs_diff=difference,
    )


def _check(info: AdapterInfo, folder: Path, output: Path, links: str | None) -> None:
    if info.base_model == OWN_WEIGHTS:
        raise ValueError(f"'{folder}' is a full model already; there is nothing to merge")
    require_mergeable(info.scope)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"'{output}' is not empty; name a new folder for the merged model")
    if links not in (None, "table", "added_tokens"):
        raise ValueError(f"links must be 'table' or 'added_tokens', got '{links}'")
    if links and not info.num_learned:
        raise ValueError(f"'{folder}' has no learned tokens; leave out --links {links}")
    if links == "table" and info.link_mode == "added_tokens":
        raise ValueError("its link tokens were trained in the vocabulary; leave out --links")


@torch.no_grad()
def _reference_logits(name, folder, options) -> Tensor:
    base, tokenizer = load_base(name, **options)
    tokenizer = AdapterInfo.load(folder).tokenizer(folder, tokenizer)
    # Rows beyond the tokenizer's vocabulary are left out, since added link tokens may use them.
    vocab_size = min(len(tokenizer), base.config.get_text_config().vocab_size)
    model, info = load_adapter(base, tokenizer, folder)
    return _logits(model, tokenizer, info, vocab_size)


def _write(name, folder, output, info: AdapterInfo, link_mode: str, options) -> None:
    base, tokenizer = load_base(name, **options)
    tokenizer = info.tokenizer(folder, tokenizer)
    if info.quantization is not None:
        base = base.dequantize(dtype=base.dtype)
        if options["quantize"] is None:  # saved quantised, in a form that is not written again
            vars(base).pop("_weight_conversions", None)
    model, _ = load_adapter(base, tokenizer, folder, merge=True, links=False)
    if part := unmergeable(model):
        raise ValueError(f"'{folder}' cannot be merged: {part}; serve it with --adapter")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output, ignore_cleanup_errors=True) as new:
        if info.has_table and link_mode == "table":
            save_links(load_links(folder), new)
        elif info.has_table:
            rows = load_links(folder).weight.data
            add_link_tokens(model, tokenizer, info.num_learned, rows=rows)
        model.save_pretrained(new)
        tokenizer.save_pretrained(new)
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
        merged.save(new)
        move_entries(new, output, last=INFO_FILE)


@torch.no_grad()
def _logits(model, tokenizer, info: AdapterInfo, vocab_size: int) -> Tensor:
    """Logits of the probe with the model's own causal attention, ``(1, S, V)`` float32."""
    first = info.link_base(model, tokenizer)
    learned = [] if first is None else list(range(first, first + info.num_learned))
    ids: list[int] = []
    for text in PROBE:
        ids += tokenizer(text, add_special_tokens=False)["input_ids"] + learned
    rows = torch.tensor([ids], device=model.device)
    return model(rows, use_cache=False).logits[..., :vocab_size].float().cpu()
