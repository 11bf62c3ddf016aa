"""Checks every causal language model class of the installed transformers.

A tiny random model of each answers a prompt longer than its windows, by full prefill and from
cached chunks. Both are compared with the stock model, with its own and with the dense mask.
"""

import multiprocessing
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
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
from blocktune.parsing import first_line
from blocktune.prompt import Chunk
from blocktune.tables import ABSENT, Table
from blocktune.testing import WORDS, byte_tokenizer

TOKENS = 500
LAYERS = 8
TOLERANCE = 1e-4  # of the largest logit
TIMEOUT_S = 180
CHUNK, BETWEEN, AROUND = 16, 2, 40  # tokens of a chunk, between two, and of all the rest


@dataclass(frozen=True)
class Family:
    """The result for one class. Differences of logits are relative to the largest logit."""

    model_type: str  # as in configurations
    name: str  # of the class
    verdict: str  # exact, exact up to a length, refused, or wrong (a defect)
    note: str = ""  # why it was refused, or what is wrong
    max_tokens: int | None = None  # length up to which the default configuration is exact
    full: float | None = None  # difference to the stock model in full attention
    block: float | None = None  # difference of cached chunks to the stock model with dense mask


def model_types(only: Sequence[str] = ()) -> tuple[str, ...]:
    """All causal language model types, or those in ``only``; ValueError if one is unknown."""
    for name in only:
        if name not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            raise ValueError(f"transformers has no causal language model of type '{name}'")
    return tuple(only or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def table(families: Sequence[Family]) -> Table:
    """A table with a row for each class."""
    rows = []
    for family in families:
        limit = "" if family.max_tokens is None else f" of {family.max_tokens:,} tokens"
        diffs = [ABSENT if x is None else f"{x:.0e}" for x in (family.full, family.block)]
        reason = family.note.partition("; ")[0].removeprefix(f"{family.name}: ")
        rows.append((family.model_type, family.name, family.verdict + limit, *diffs, reason))
    headings = ("type", "class", "result", "full", "block", "reason")
    return Table(headings, rows, left=("class", "result", "reason"))


def check_families(names: Sequence[str]) -> Iterator[Family]:
    """Checks model types, each in its own process with a time limit of `TIMEOUT_S`."""
    context = multiprocessing.get_context("fork")  # so that transformers is imported only once
    for name in names:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=_report, args=(name, sender), daemon=True)
        process.start()
        sender.close()
        started, result = time.monotonic(), None
        if receiver.poll(TIMEOUT_S):
            with suppress(EOFError):  # it died
                result = receiver.recv()
            process.join(10)  # or its exit code would be that of the signal
        process.kill()
        process.join()
        seconds, cls = time.monotonic() - started, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(name, name)
        note = f"no result after {seconds:.0f} s (exit code {process.exitcode})"
        yield result or Family(name, cls, "wrong", note)


def _report(name: str, pipe) -> None:
    torch.set_num_threads(1)
    with quiet():
        pipe.send(check_family(name))


def check_family(model_type: str) -> Family:
    """Checks the class of a model type in this process."""
    name, limit = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type], None
    try:
        config, cls = _tiny(model_type)
        name = cls.__name__
        structure = examine(config, cls)
        limit = structure.max_tokens and examine(_default(model_type)).max_tokens
        with torch.no_grad():
            full, block, wrong = _compared(config, cls, structure)
    except Refused as refusal:
        return Family(model_type, name, "refused", str(refusal))
    except Exception as error:
        return Family(model_type, name, "wrong", f"{type(error).__name__}: {first_line(error)}")
    if wrong or not (full <= TOLERANCE and block <= TOLERANCE):  # a NaN is wrong, too
        return Family(model_type, name, "wrong", wrong, limit, full, block)
    verdict = "exact" if structure.max_tokens is None else "exact up to a length"
    return Family(model_type, name, verdict, "", limit, full, block)


MISSING = {"n_routed_experts": 4, "num_experts_per_tok": 2}  # None by default, but needed
MISSING |= dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1)
_CONVOLUTIONS = {"layer_types": ["conv", "conv", "full_attention", "conv"] * 8}
_NO_LAYER_INPUT = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
_AS_SAVED: dict[str, dict] = {
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 10_000.0}}
    },
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text"} | _NO_LAYER_INPUT},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "clip_qkv": 8.0}},
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS,
    "reformer": {"is_decoder": True},
}
"""Fields that all published models of a type set, but its default configuration does not."""


def _default(model_type: str) -> PreTrainedConfig:
    return CONFIG_MAPPING[model_type](**_AS_SAVED.get(model_type, {}))


def _tiny(model_type: str) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
    """A small configuration of a model type (for some, the default one), and its class."""
    try:
        full_config = _default(model_type)
        text = full_config.get_text_config(decoder=True)
    except Exception as error:
        line = " ".join(str(error).split())
        raise Refused(f"transformers has no valid default configuration of it: {line}") from None
    cls, values = causal_class(text) or causal_class(full_config), text.to_dict()
    for name, value in MISSING.items():
        if name in values and values[name] is None:
            setattr(text, name, value)
    if values.get("attention_multiplier") == 1:  # Granite's default, under which float32 is noise
        text.attention_multiplier = 0.1
    if values.get("num_kv_shared_layers"):  # refused; the message shows the default numbers
        return text, cls
    differing = [1 + int(index) for index in values.get("per_layer_config") or ()]
    try:
        depth = min(text.num_hidden_layers, LAYERS)
        # The last layer is one with values of its own, where some have them (Gemma 4).
        depth = max((layer for layer in differing if layer <= depth), default=depth)
        return small_config(text, heads=4, layers=depth), cls
    except Exception:
        return text, cls


def _compared(
    config: PreTrainedConfig, cls: type[PreTrainedModel], structure: Structure
) -> tuple[float, float, str]:
    """Relative differences with full and with block attention, and the first failed check."""
    stock = small_model(config, cls)
    engine = Engine(small_model(config, cls), byte_tokenizer(), format=WORDS)
    length = min(TOKENS, structure.max_tokens or TOKENS)
    ask = _ask(length)
    logits = engine.next_logits([ask], "full-prefill")
    ids = batch_of(engine, build("full-prefill"), ask).input_ids
    expected = stock(ids, use_cache=False).logits[:, -1]
    batch = batch_of(engine, build("naive"), ask)
    reused = engine.next_logits([ask], "naive")
    expected_block = _masked(stock, batch.input_ids, batch.layout, structure)[:, -1]
    engine.answer([ask], "naive", max_new_tokens=2)  # must not fail when it reports its usage
    failed = [c for c in check_model(engine) if not c.passed] if length >= 300 else []
    scale = float(expected.abs().max())
    if not scale or difference(expected, expected_block) <= 10 * TOLERANCE * scale:
        return 0.0, 0.0, "hiding chunks from each other changes nothing, so the check is void"
    wrong = f"check: {failed[0].name} ({failed[0].max_abs_diff:.1e})" if failed else ""
    return difference(logits, expected) / scale, difference(reused, expected_block) / scale, wrong


def _ask(tokens: int) -> Ask:
    """A request of at most this many tokens (bytes), in chunks slightly longer than a window."""
    words = "".join(chunk.text for chunk in ASK.chunks) * (tokens // CHUNK)
    starts = range(0, max(0, tokens - AROUND) // (CHUNK + BETWEEN) * CHUNK, CHUNK)
    return Ask("Who?", tuple(Chunk(words[start : start + CHUNK]) for start in starts))


def _masked(stock: nn.Module, ids: Tensor, layout: Layout, structure: Structure) -> Tensor:
    """Logits of the stock model with the dense mask, or a mask for each kind of layer."""

    def mask(window: int | None) -> Tensor:
        visible = dense_mask(layout, LayerRule(window=window))
        if stock.config._attn_implementation != "eager":
            return visible
        return torch.zeros(visible.shape).masked_fill_(~visible, torch.finfo(torch.float32).min)

    options = {"position_ids": layout.position, "use_cache": False}
    if kinds := getattr(stock.config, "layer_types", None):
        windows = dict(zip(kinds, structure.windows, strict=True))
        masks = {kind: mask(window) for kind, window in windows.items()}
        try:
            return stock(ids, attention_mask=masks, **options).logits
        except (AttributeError, TypeError, ValueError):  # it takes one mask
            if len(set(structure.windows)) > 1:
                raise
    return stock(ids, attention_mask=mask(structure.windows[0]), **options).logits
