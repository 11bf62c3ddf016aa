"""Compares next-token distributions with full prefill's, for methods and for ranges of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import product
from math import isfinite
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blocktune.engine import Engine, Request
from blocktune.engine.batch_prefill import prefill_warm
from blocktune.engine.generation import require_numbers
from blocktune.evaluation.prepare import Ready
from blocktune.evaluation.results import mean_of
from blocktune.evaluation.ttft import CleanCaches
from blocktune.methods import Method, build


class Agreement(NamedTuple):
    """Agreement of a method with full prefill, over the tokens of full prefill's answer."""

    kl: float  # mean of KL(full prefill || method), in nats
    top1: float  # share of positions at which both have the same most likely token
    tokens: int  # number of positions compared


def agreement(full: Tensor, own: Tensor) -> Agreement:
    """Compares next-token distributions at the same positions, given as logits ``(T, V)``.

    Tokens that full prefill excludes (a logit of -inf) count nothing. ValueError: no finite KL.
    """
    require_numbers(full)
    require_numbers(own)
    wanted, given = full.double().log_softmax(-1), own.double().log_softmax(-1)
    terms = (wanted.exp() * (wanted - given)).masked_fill(wanted.isneginf(), 0)
    kl = terms.sum(-1).mean().item()
    if not isfinite(kl):
        wanted = f"the KL divergence from full prefill must be a finite number, got {kl}"
        raise ValueError(f"{wanted}: logits are infinite; try dtype float32")
    same = (wanted.argmax(-1) == given.argmax(-1)).double().mean().item()
    return Agreement(max(0.0, kl), same, len(full))


def forced_logits(
    run: Any, num_tokens: int, ids: list[int] | None = None
) -> tuple[list[int], Tensor]:
    """Decodes ``ids``, or ``num_tokens`` greedily: the tokens, and their logits ``(T, V)``."""
    logits: list[Tensor] = []

    def pick(batch: Tensor) -> Tensor:
        logits.append(batch[0].float().cpu())
        if ids is None:
            return batch.argmax(-1, keepdim=True)
        return torch.tensor([[ids[len(logits) - 1]]], device=batch.device)

    sampling = SimpleNamespace(picker=lambda *_: pick)  # in place of `Sampling`
    tokens = run.tokens(sampling, len(ids) if ids else num_tokens)
    return [int(token[0]) for token in tokens], torch.stack(logits)


def measure_fidelity(ready: Ready, track: Callable[..., Iterable]) -> dict[str, dict[str, float]]:
    """Compares every method with full prefill on the first questions of each task.

    Full prefill uses the same weights as the method, so the effect of reuse is measured, not that
    of tuning. ``track`` is `rich.progress.Progress.track`. Returns means of `Agreement` by label.
    """
    suite, caches = ready.suite, CleanCaches()
    asked = [(task, e) for task in suite.tasks for e in ready.of(task, suite.fidelity.num)]
    compared: dict[str, list[dict[str, Any]]] = {spec.label: [] for spec in suite.methods}
    pairs = list(product(asked, suite.methods))
    for (task, example), spec in track(pairs, description="fidelity"):
        engine, method = ready.engine(spec, task), ready.methods[spec.label]
        caches.prepare(engine, method, [example])
        words = engine.format
        if engine.prompts.spec(method).block and words.full_tag != words.block_tag:
            # Full prefill reads the same mode tag, so that only the effect of reuse is measured.
            engine = engine.reworded(replace(words, full_tag=words.block_tag))
        oracle = engine.prefilled([example], build("full-prefill"))
        ids, wanted = forced_logits(oracle, suite.fidelity.tokens)
        pieces = engine.prompts.pieces(example, method)
        run = prefill_warm(engine.state, engine.prompts, [pieces], method)
        _, own = forced_logits(run, len(ids), ids)
        compared[spec.label].append(agreement(wanted, own)._asdict())
    return {label: mean_of(agreements) for label, agreements in compared.items()}


@dataclass(frozen=True)
class ProfiledRange:
    """Result of recomputing one contiguous range of layers."""

    first_layer: int  # first layer of the range, 0-based
    num_layers: int  # length of the range
    ratio: float  # share of the model's layers, the parameter of ``droidspeak``
    divergence: float  # KL(full prefill || it) of the first answer token in nats, mean
    agreement: float  # share of the examples with the same most likely first token
    efficient: bool = False  # whether no range of as many or fewer layers has less divergence


@torch.no_grad()
def profile_layers(
    engine: Engine,
    examples: Sequence[Request],
    *,
    most_layers: int | None = None,
    batch_size: int = 8,
    progress: Callable[[list[tuple[int, int]]], Iterator[tuple[int, int]]] = iter,
) -> list[ProfiledRange]:
    """Tries every contiguous range of layers on held-out examples, in O(layers squared) passes.

    Ranges have up to ``most_layers`` layers and are ordered by length, then first layer;
    ``progress`` wraps their list. ValueError: no examples, a wrong ``most_layers``, or NaN logits.

    Source: DroidSpeak arXiv:2411.02820, offline profiling. The paper scores a task; here the
    divergence of the first answer token from full prefill's is used, which needs fewer examples.
    """
    depth = engine.prompts.num_layers
    longest = depth if most_layers is None else most_layers
    if not examples or not 1 <= longest <= depth:
        got = f"{len(examples)} examples and at most {longest} layers"
        raise ValueError(f"profiling needs examples and ranges of 1 to {depth} layers; got {got}")

    def first_tokens(method: Method) -> Tensor:
        starts = range(0, len(examples), batch_size)
        logits = [engine.next_logits(examples[a : a + batch_size], method) for a in starts]
        return torch.cat(logits).float().cpu()

    full = first_tokens(build("full-prefill"))
    ranges = [(first, n) for n in range(1, longest + 1) for first in range(depth - n + 1)]
    tried = []
    for first, length in progress(ranges):
        method = build("droidspeak", first_layer=first, ratio=length / depth)
        kl, top1, _ = agreement(full, first_tokens(method))
        tried.append(ProfiledRange(first, length, length / depth, kl, top1))
    least = {n: min(r.divergence for r in tried if r.num_layers <= n) for _, n in ranges}
    return [replace(r, efficient=r.divergence <= least[r.num_layers]) for r in tried]
