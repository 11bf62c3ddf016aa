"""Cross-entropy over answer tokens, from no more logits than those."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocktune.attention import make_plan
from blocktune.layout import Layout
from blocktune.prompt import IGNORED


class AnswerLoss(NamedTuple):
    """Sums over the answer tokens of one batch.

    Attributes:
        total: Sum of the negative log-likelihoods in nats, float32, differentiable.
        num_tokens: Answer tokens.
        num_correct: Answer tokens that were the most likely ones.
    """

    total: Tensor
    num_tokens: Tensor
    num_correct: Tensor


def answer_loss(
    model: nn.Module, input_ids: Tensor, layout: Layout, labels: Tensor, execution: str = "split"
) -> AnswerLoss:
    """Runs a model under a layout and scores its answers.

    Args:
        model: With blocktune's attention attached; may be wrapped by PEFT, DDP or DeepSpeed.
        input_ids: ``(B, S)``.
        layout: ``(B, S)``.
        labels: ``(B, S)``, not shifted, -100 where nothing is learnt.
        execution: Of attention, see `blocktune.attention.make_plan`.

    Returns:
        Sums; divide by the tokens of the whole step, over accumulation and ranks.
    """
    targets = labels[:, 1:]
    # One index for all prompts of the batch: the rows before any prompt's answer tokens.
    keep = (targets != IGNORED).any(0).nonzero().squeeze(1)
    logits = model(
        input_ids=input_ids,
        position_ids=layout.position,
        plan=make_plan(execution, layout),
        use_cache=False,
        logits_to_keep=keep,
    ).logits
    if logits.shape[1] != keep.numel():
        raise ValueError(
            f"the model gave logits of {logits.shape[1]} rows, {keep.numel()} were asked for; "
            "its forward must honour logits_to_keep, as transformers' decoders do"
        )
    targets = targets[:, keep].flatten()
    logits = logits.flatten(0, 1).float()
    total = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum")
    with torch.no_grad():
        correct = (logits.argmax(-1) == targets).sum()  # -100 is never the argmax
    return AnswerLoss(total, (targets != IGNORED).sum(), correct)
