"""The optimisers, and the gradient of one step over all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from examples.tiny_model.config import PretrainConfig
from examples.tiny_model.contexts import MicroBatch
from examples.tiny_model.muon import Muon


class Tally(NamedTuple):
    """Sums over one step and all processes."""

    loss: float  # weighted
    weight: float
    right: float  # correct answer tokens
    answers: float  # answer tokens
    tokens: float


def make_optimizers(
    model: nn.Module, config: PretrainConfig
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Muon for the matrices, AdamW for embeddings and norms, each with its peak learning rate.

    The rates are scalar tensors on the model's device, to be set before each step, since a CUDA
    graph would not update a number.
    """
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    cuda = others[0].is_cuda
    rates = [torch.zeros((), device=others[0].device) for _ in range(2)]
    adam = torch.optim.AdamW(
        others, lr=rates[1], betas=(0.9, 0.98), weight_decay=0.0, foreach=cuda, capturable=cuda
    )
    return [(Muon(matrices, lr=rates[0]), config.muon_lr), (adam, config.adam_lr)]


def backward(model: nn.Module, batches: Sequence[MicroBatch], given: Tensor) -> Tensor:
    """Computes gradients of the weighted mean loss over the tokens of all processes.

    Args:
        model: Its gradients must be zero or None.
        batches: This process's share of the step, on the model's device.
        given: Answer tokens that need no context, see `given_ids`; not counted in accuracy.

    Returns:
        A `Tally` as a tensor ``(5,)`` float64, which avoids synchronising with a GPU.
    """
    sums = torch.zeros(len(Tally._fields), dtype=torch.float64, device=given.device)
    for batch in batches:
        sums += _accumulate(model, batch, given)
    grads = [p.grad for p in model.parameters()]
    if dist.is_initialized():
        dist.all_reduce(sums)
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        parts = flat.split([grad.numel() for grad in grads])
        torch._foreach_copy_(grads, [p.view_as(g) for p, g in zip(parts, grads, strict=True)])
    weight = sums[Tally._fields.index("weight")].float()
    torch._foreach_div_(grads, weight.clamp(min=1))
    return sums


def _accumulate(model, batch: MicroBatch, given: Tensor) -> Tensor:
    """Adds gradients of the weighted loss. Causal masking makes right padding harmless."""
    with torch.autocast("cuda", torch.bfloat16, enabled=batch.ids.is_cuda):
        logits = model(input_ids=batch.ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    target, weight = batch.ids[:, 1:].flatten(), batch.weights[:, 1:].flatten()
    loss = (cross_entropy(logits.float(), target, reduction="none") * weight).sum()
    loss.backward()
    answer = (weight > 1) & ~torch.isin(target, given)
    right = ((logits.detach().argmax(-1) == target) & answer).sum()
    tokens = (batch.weights > 0).sum()
    sums = loss.detach(), weight.sum(), right, answer.sum(), tokens
    return torch.stack([value.double() for value in sums])
