"""How close next-token distributions are to full prefill's: a suite's methods, ranges of layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blocktune.data import RagExample
from blocktune.engine import Engine, Request
from blocktune.evaluation.prepare import Ready
from blocktune.evaluation.results import mean_of
from blocktune.methods import build


class Agreement(NamedTuple):
    """Closeness over the tokens of full prefill's own answer."""

    kl: float  # mean of KL(full prefill || method), in nats
    top1: float  # share of tokens that both find likeliest
    tokens: int  # how many were compared


def agreement(full: Tensor, own: Tensor) -> Agreement:
    """Compares next-token distributions after the same tokens, given as logits ``(T, V)``."""
    wanted, given = full.double().log_softmax(-1), own.double().log_softmax(-1)
    kl = (wanted.exp() * (wanted - given)).sum(-1).mean().item()
    same = (wanted.argmax(-1) == given.argmax(-1)).double().mean().item()
    return Agreement(max(0.0, kl), same, len(full))


class Forced:
    """Stands for `Sampling`: decodes ``ids``, or greedily if None, and keeps the logits of each."""

    def __init__(self, ids: list[int] | None = None):
        self.ids, self.logits = ids, []

    def picker(self, device: torch.device, *streams: Any) -> Callable[[Tensor], Tensor]:
        """As `Sampling.picker`, for a batch of one prompt."""

        def pick(logits: Tensor) -> Tensor:
            self.logits.append(logits[0].float().cpu())
            if self.ids is None:
                return logits.argmax(-1, keepdim=True)
            return torch.tensor([[self.ids[len(self.logits) - 1]]], device=logits.device)

        return pick


def forced_logits(run: Any, num_tokens: int, ids: list[int] | None = None) -> Forced:
    """Decodes after a prefill of one prompt and keeps the logits of each step."""
    forced = Forced(ids)
    made = [int(token[0]) for token in run.tokens(forced, len(ids) if ids else num_tokens)]
    forced.ids = forced.ids or made
    return forced


def measure_fidelity(ready: Ready, step: Callable[[], None]) -> dict[str, dict[str, float]]:
    """Every method against full prefill on the same weights, on the first questions of each task.

    Tuning moves distributions too; here only what reuse changes is measured. ``step`` is called
    after every prompt. Returns label -> means over prompts of the fields of `Agreement`.
    """
    suite = ready.suite
    found: dict[str, list[dict[str, Any]]] = {spec.label: [] for spec in suite.methods}
    for task in suite.tasks:
        for example in ready.of(task, suite.fidelity.num):
            for spec in suite.methods:
                given = ready.engine(spec, task), example, ready.methods[spec.label]
                found[spec.label].append(_compare(*given, suite.fidelity.tokens))
                step()
    return {label: mean_of(compared) for label, compared in found.items()}


def _compare(engine: Any, example: RagExample, method: Any, num_tokens: int) -> dict[str, Any]:
    oracle, words = build("full-prefill"), engine.format
    if engine.prompts.spec(method).block and words.full_tag != words.block_tag:
        # Full attention after the same tag: what reuse changes is measured, not what a tag does.
        engine = engine.reworded(replace(words, full_tag=words.block_tag))
    wanted = forced_logits(engine.prefilled([example], oracle), num_tokens)
    own = forced_logits(engine.prefilled([example], method), num_tokens, wanted.ids)
    return agreement(torch.stack(wanted.logits), torch.stack(own.logits))._asdict()


@dataclass(frozen=True)
class ProfiledRange:
    """One range of layers that was recomputed."""

    first_layer: int  # first of them, 0-based
    num_layers: int  # how many
    ratio: float  # share of the layers, as ``droidspeak`` takes it
    # nats by which the first answer token's distribution differs from a full prefill's (KL from
    # full prefill), mean over the examples
    divergence: float
    agreement: float  # share of the examples whose likeliest first token is the full prefill's
    efficient: bool = False  # whether no range of as few layers diverges less


@torch.no_grad()
def profile_layers(
    engine: Engine,
    examples: Sequence[Request],
    *,
    most_layers: int | None = None,
    batch_size: int = 8,
    progress: Callable[[list[tuple[int, int]]], Iterator[tuple[int, int]]] = iter,
) -> list[ProfiledRange]:
    """Tries every contiguous range of layers on held-out examples: O(layers squared) passes.

    ``progress`` wraps the ranges ``(first, length)`` to try, up to ``most_layers`` long. The
    results are ordered by length, then first layer; the efficient ones are marked.

    Raises:
        ValueError: If there is no example, or ``most_layers`` is out of range.

    Source: DroidSpeak arXiv:2411.02820, offline profiling. Its quality is a task's score; here it
    is how far the model's next token is from a full prefill's, which needs fewer examples.
    """
    depth = engine.prompts.num_layers
    longest = depth if most_layers is None else most_layers
    if not examples or not 1 <= longest <= depth:
        raise ValueError(
            f"profiling needs examples and ranges of 1 to {depth} layers; got {len(examples)} "
            f"examples and at most {longest} layers"
        )
    full = _first_tokens(engine, examples, build("full-prefill"), batch_size)
    ranges = [(first, n) for n in range(1, longest + 1) for first in range(depth - n + 1)]
    tried = []
    for first, length in progress(ranges):
        method = build("droidspeak", first_layer=first, ratio=length / depth)
        served = _first_tokens(engine, examples, method, batch_size)
        kl, top1, _ = agreement(full, served)
        tried.append(ProfiledRange(first, length, length / depth, kl, top1))
    least = {n: min(one.divergence for one in tried if one.num_layers <= n) for _, n in ranges}
    return [replace(one, efficient=one.divergence <= least[one.num_layers]) for one in tried]


def _first_tokens(engine: Engine, examples, method, batch_size: int) -> torch.Tensor:
    """Logits of each example's first answer token, ``(examples, V)``."""
    starts = range(0, len(examples), batch_size)
    logits = [engine.next_logits(examples[a : a + batch_size], method) for a in starts]
    return torch.cat(logits).float().cpu()
