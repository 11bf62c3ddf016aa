"""Every causal language model of the installed transformers, tried: exact, or refused and why.

A tiny random model of each class answers a prompt of 500 tokens, longer than all its windows, in
full and from cached chunks. Both are compared with a forward of the stock model: by its own masks,
and by the dense mask of the layout.
"""

from __future__ import annotations

import difflib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from blocktune.attention import dense_mask
from blocktune.check.serving import ASK, Ask, batch_of, check_model, difference
from blocktune.engine import Engine
from blocktune.layout import LayerRule, Layout
from blocktune.methods import build
from blocktune.models.gate import examine
from blocktune.models.probe import Refused, Structure
from blocktune.models.small import causal_class, quiet, small_config, small_model
from blocktune.prompt import Chunk
from blocktune.tables import ABSENT, Table
from blocktune.testing import WORDS, byte_tokenizer

TOKENS = 500
LAYERS = 8
TOLERANCE = 1e-4  # of the largest logit
TIMEOUT_S = 180
CHUNK, BETWEEN, AROUND = 16, 2, 40
"""Tokens of a chunk, between two, and of instruction, question and template."""


@dataclass(frozen=True)
class Family:
    """What was found of one class; differences are of logits, as a share of the largest."""

    model_type: str  # as configurations name it
    name: str  # the class
    verdict: str  # exact, exact up to a length, refused, or wrong: a defect
    note: str = ""  # why it was refused, or what is wrong
    max_tokens: int | None = None  # up to which the default configuration is exact
    full: float | None = None  # difference to the stock model in full attention
    block: float | None = None  # the same, from cached chunks, under the dense mask


def model_types(only: Sequence[str] = ()) -> tuple[str, ...]:
    """All model types of causal language models, or these; ValueError if one is unknown."""
    for name in only:
        if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            close = difflib.get_close_matches(name, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, n=3)
            hint = f"; near: {', '.join(close)}" if close else ""
            raise ValueError(f"transformers has no causal language model of type '{name}'{hint}")
    return tuple(only or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def table(found: Sequence[Family]) -> Table:
    """A row for each class."""
    rows = []
    for one in found:
        limit = "" if one.max_tokens is None else f" of {one.max_tokens:,} tokens"
        shown = [ABSENT if x is None else f"{x:.0e}" for x in (one.full, one.block)]
        reason = one.note.partition("; ")[0].removeprefix(f"{one.name}: ")
        rows.append((one.model_type, one.name, one.verdict + limit, *shown, reason))
    headings = ("type", "class", "result", "full", "block", "reason")
    return Table(headings, rows, left=("class", "result", "reason"))


def check_families(names: Sequence[str]) -> Iterator[Family]:
    """Tries model types, each in a process of its own that may take `TIMEOUT_S`."""
    context = multiprocessing.get_context("fork")  # transformers is imported once
    for name in names:
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_report, args=(name, theirs), daemon=True)
        process.start()
        theirs.close()
        started = time.monotonic()
        found = None
        if ours.poll(TIMEOUT_S):
            try:
                found = ours.recv()
            except EOFError:
                process.join()
        took = time.monotonic() - started
        process.kill()
        process.join()
        note = f"no result after {took:.0f} s (exit code {process.exitcode})"
        cls = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name, name)
        yield found or Family(name, cls, "wrong", note)


def _report(name: str, pipe) -> None:
    torch.set_num_threads(1)
    with quiet():
        pipe.send(check_family(name))


def check_family(model_type: str) -> Family:
    """Tries the class of one of `model_types` in this process."""
    name, limit = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], None
    try:
        config, cls = _tiny(model_type)
        name = cls.__name__
        structure = examine(config, cls)
        limit = _default_limit(model_type, structure)
        with torch.no_grad():
            full, block, wrong = _compared(config, cls, structure)
    except Refused as refusal:
        return Family(model_type, name, "refused", str(refusal))
    except Exception as error:
        line = (str(error).strip() or "no message").splitlines()[0]
        return Family(model_type, name, "wrong", f"{type(error).__name__}: {line}")
    if wrong or max(full, block) > TOLERANCE:
        return Family(model_type, name, "wrong", wrong, limit, full, block)
    verdict = "exact" if structure.max_tokens is None else "exact up to a length"
    return Family(model_type, name, verdict, "", limit, full, block)


MISSING = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "n_shared_experts": 1,
}
"""Values of fields that some default configurations leave open, though their models need them."""
_CONVOLUTIONS = {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8}
_AS_SAVED: dict[str, dict] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    },
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS,
    "reformer": {"is_decoder": True},
}
"""What all published models of a type say, and its default configuration does not."""


def _default(model_type: str) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**_AS_SAVED.get(model_type, {}))


def _tiny(model_type: str) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """A small configuration of a model type (of some, the default one) and the model's class."""
    try:
        whole = _default(model_type)
        text = whole.get_text_config(decoder=True)
    except Exception as error:
        line = " ".join(str(error).split())
        raise Refused(f"transformers has no valid default configuration of it: {line}") from None
    cls, given = causal_class(text) or causal_class(whole), text.to_dict()
    open_ones = {k: v for k, v in MISSING.items() if k in given and given[k] is None}
    if given.get("attention_multiplier") == 1:  # Granite's default, under which float32 is noise
        open_ones["attention_multiplier"] = 0.1
    for name, value in open_ones.items():
        setattr(text, name, value)
    if given.get("num_kv_shared_layers"):  # refused, with the numbers of a whole model
        return text, cls
    differing = [1 + int(index) for index in given.get("per_layer_config") or ()]
    try:
        depth = min(text.num_hidden_layers, LAYERS)
        # The last layer is one with values of its own, where some have them (Gemma 4).
        depth = max((one for one in differing if one <= depth), default=depth)
        return small_config(text, heads=4, layers=depth), cls
    except Exception:
        return text, cls


def _default_limit(model_type: str, structure: Structure) -> int | None:
    if structure.max_tokens is None:
        return None
    return examine(_default(model_type)).max_tokens


def _compared(
    config: PreTrainedConfig, cls: type[PreTrainedModel], structure: Structure
) -> tuple[float, float, str]:
    """Relative differences in full and in block attention, and a check that fails."""
    tokenizer = byte_tokenizer()
    stock = small_model(config, cls)
    engine = Engine(small_model(config, cls), tokenizer, format=WORDS)
    length = min(TOKENS, structure.max_tokens or TOKENS)
    ask = _ask(length)
    logits = engine.next_logits([ask], "full-prefill")
    ids = batch_of(engine, build("full-prefill"), ask).input_ids
    whole = stock(ids, use_cache=False).logits[:, -1]
    batch = batch_of(engine, build("naive"), ask)
    reused = engine.next_logits([ask], "naive")
    masked = _masked(stock, batch.input_ids, batch.layout, structure)[:, -1]
    engine.answer([ask], "naive", max_new_tokens=2)  # counts what it cost, too
    failed = [one for one in check_model(engine) if not one.passed] if length >= 300 else []
    scale = float(whole.abs().max())
    if not scale or difference(whole, masked) <= 10 * TOLERANCE * scale:
        return 0.0, 0.0, "hiding chunks from each other changes nothing, so nothing is proven"
    wrong = f"check: {failed[0].name} ({failed[0].max_abs_diff:.1e})" if failed else ""
    return difference(logits, whole) / scale, difference(reused, masked) / scale, wrong


def _ask(tokens: int) -> Ask:
    """A prompt of at most this many tokens (bytes), in chunks slightly longer than a window."""
    words = "".join(chunk.text for chunk in ASK.chunks) * (tokens // CHUNK)
    starts = range(0, max(0, tokens - AROUND) // (CHUNK + BETWEEN) * CHUNK, CHUNK)
    return Ask("Who?", tuple(Chunk(words[start : start + CHUNK]) for start in starts))


def _masked(stock: nn.Module, ids: Tensor, layout: Layout, structure: Structure) -> Tensor:
    """Logits of the stock model under the dense mask, one for each window."""
    config = stock.config
    additive = config._attn_implementation == "eager"

    def mask(window: int | None) -> Tensor:
        seen = dense_mask(layout, LayerRule(window=window))
        if not additive:
            return seen
        hidden = torch.finfo(torch.float32).min
        return torch.zeros(seen.shape).masked_fill_(~seen, hidden)

    kinds = getattr(config, "layer_types", None) or ()
    masks: list[Callable] = [lambda: mask(structure.windows[0])]
    if kinds:
        by_kind = dict(zip(kinds, structure.windows, strict=True))
        masks.insert(0, lambda: {kind: mask(window) for kind, window in by_kind.items()})
    options = {"position_ids": layout.position, "use_cache": False}
    for index, make in enumerate(masks):
        try:
            return stock(ids, attention_mask=make(), **options).logits
        except (AttributeError, TypeError, ValueError):
            if index + 1 == len(masks) or len(set(structure.windows)) > 1:
                raise
    raise AssertionError
