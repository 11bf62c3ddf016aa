"""Optimisers, and the gradient of one step over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from blocktune.training.pretraining.config import PretrainConfig
from blocktune.training.pretraining.contexts import Conversation, MicroBatch, micro_batches
from blocktune.training.pretraining.muon import Muon


class Tally(NamedTuple):
    """Sums over one step, all processes: weighted loss, weights, answer tokens right and in all."""

    loss: float
    weight: float
    right: float
    answers: float
    tokens: float


def make_optimizers(
    model: nn.Module, config: PretrainConfig
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices, AdamW for embeddings and norms, each with its peak rate."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    muon = Muon(matrices, lr=config.muon_lr)
    adam = torch.optim.AdamW(others, lr=config.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    return [(muon, config.muon_lr), (adam, config.adam_lr)]


def backward(
    model: nn.Module,
    config: PretrainConfig,
    sequences: Sequence[Conversation],
    pad_id: int,
    given: Tensor,
) -> Tally:
    """Leaves the gradient of the weighted mean loss over all processes' tokens in the model.

    Args:
        model: Without gradients yet.
        config: Of the run.
        sequences: This process's share of the step.
        pad_id: Id of pad rows.
        given: Answer tokens that need no context, `given_ids`; accuracy leaves them out.
    """
    sums = torch.zeros(len(Tally._fields), dtype=torch.float64)
    for batch in micro_batches(sequences, config.micro_tokens, pad_id):
        sums += _accumulate(model, batch, given)
    dist.all_reduce(sums)
    tally = Tally(*sums.tolist())
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    dist.all_reduce(flat)
    start = 0
    for p in model.parameters():
        p.grad.copy_(flat[start : start + p.numel()].view_as(p) / tally.weight)
        start += p.numel()
    return tally


def _accumulate(model, batch: MicroBatch, given: Tensor) -> Tensor:
    """Adds the gradient of the weighted loss sum; causal masking makes right pads harmless."""
    logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    target, weight = batch.ids[:, 1:].flatten(), batch.weights[:, 1:].flatten()
    loss = (cross_entropy(logits, target, reduction="none") * weight).sum()
    loss.backward()
    answer = (weight > 1) & ~torch.isin(target, given)
    right = (logits.detach().argmax(-1) == target)[answer].sum()
    tokens = (batch.weights > 0).sum()
    sums = loss.detach(), weight.sum(), right, answer.sum(), tokens
    return torch.stack([value.double() for value in sums])
