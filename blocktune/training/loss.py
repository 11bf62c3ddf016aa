"""Answer rows: their logits, and cross-entropy from no more logits than those."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocktune.attention import Plan, make_plan
from blocktune.layout import Layout
from blocktune.prompt import IGNORED, Batch


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


class AnswerRows(NamedTuple):
    """What a model says where answer tokens are to follow, prompt by prompt in their order.

    Attributes:
        logits: ``(T, V)``, T answer tokens.
        targets: The tokens, ``(T,)``.
        hidden: Every layer's output ``(B, S, hidden)`` after the embeddings', if asked for.
    """

    logits: Tensor
    targets: Tensor
    hidden: tuple[Tensor, ...] | None = None

    def cross_entropy(self) -> AnswerLoss:
        """Scores the answers."""
        logits = self.logits.float()
        total = F.cross_entropy(logits, self.targets, reduction="sum")
        with torch.no_grad():
            correct = (logits.argmax(-1) == self.targets).sum()
        return AnswerLoss(total, torch.tensor(len(self.targets), device=total.device), correct)


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
    batch = Batch(input_ids, layout, labels)
    return answer_rows(model, batch, make_plan(execution, layout)).cross_entropy()


def answer_rows(model: nn.Module, batch: Batch, plan: Plan, hidden: bool = False) -> AnswerRows:
    """Runs a model and keeps the logits of the rows before answer tokens.

    Args:
        model: See `answer_loss`.
        batch: Ids, layout and labels.
        plan: Prepared for its layout.
        hidden: Whether every layer's output is wanted.

    Raises:
        ValueError: If the model does not honour ``logits_to_keep``.
    """
    targets = batch.labels[:, 1:]
    # One index for all prompts of the batch: the rows before any prompt's answer tokens.
    keep = (targets != IGNORED).any(0).nonzero().squeeze(1)
    more: dict[str, Any] = {"output_hidden_states": True} if hidden else {}
    output = model(
        input_ids=batch.input_ids,
        position_ids=batch.layout.position,
        plan=plan,
        use_cache=False,
        logits_to_keep=keep,
        **more,
    )
    if output.logits.shape[1] != keep.numel():
        raise ValueError(
            f"the model gave logits of {output.logits.shape[1]} rows, {keep.numel()} were asked "
            "for; its forward must honour logits_to_keep, as transformers' decoders do"
        )
    targets = targets[:, keep]
    learnt = targets != IGNORED
    return AnswerRows(
        output.logits[learnt], targets[learnt], output.hidden_states if hidden else None
    )
