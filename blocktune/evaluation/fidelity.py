"""How close a method's next-token distributions are to full prefill's, on the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from blocktune.data import RagExample
from blocktune.evaluation.prepare import Ready
from blocktune.evaluation.results import mean_of
from blocktune.methods import build


class Agreement(NamedTuple):
    """Closeness over the tokens of full prefill's own answer.

    Attributes:
        kl: Mean of KL(full prefill || method), in nats.
        top1: Share of tokens that both find likeliest.
        tokens: How many were compared.
    """

    kl: float
    top1: float
    tokens: int


def agreement(full: Tensor, own: Tensor) -> Agreement:
    """Compares next-token distributions.

    Args:
        full: Logits of full prefill after the same tokens, ``(T, V)``.
        own: The method's, ``(T, V)``.
    """
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

    Tuning moves distributions too; here only what reuse changes is measured.

    Args:
        ready: A suite with ``fidelity``.
        step: Called after every prompt, for a progress bar.

    Returns:
        Label -> ``kl``, ``top1``, ``tokens``: means over prompts.
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
