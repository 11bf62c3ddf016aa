"""The loss of a step: cross-entropy of answer rows, divergence from a teacher, hidden states."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocktune.attention import Plan, make_plan
from blocktune.layout import Layout
from blocktune.positions import RopeSpec
from blocktune.prompt import IGNORED, Batch
from blocktune.training.distillation import (
    Distillation,
    Recorder,
    divergence,
    hidden_errors,
    kv_errors,
    question_rows,
    row_weights,
    teacher_probs,
)


class Sums(NamedTuple):
    """Sums over answer tokens: of one batch (tensors), or of all since the last log (numbers)."""

    tokens: Any = 0.0  # how many
    correct: Any = 0.0  # those that were the likeliest
    rows: Any = 0.0  # rows of the batch that are not padding
    total: Any = 0.0  # what is minimised, in nats; as a tensor float32 and differentiable
    cross_entropy: Any = 0.0  # in nats
    divergence: Any = 0.0  # from the teacher over answer rows, in nats; 0 without a teacher
    states: Any = 0.0  # weighted errors of the states; 0 where they are not matched

    def means(self, has_teacher: bool) -> dict[str, float]:
        """Per answer token; the parts of the loss only where there are several."""
        if not self.tokens:
            return {}
        names = ("cross_entropy", "divergence", "states") if has_teacher else ()
        means = {name: getattr(self, name) / self.tokens for name in names}
        return {"mean_token_accuracy": self.correct / self.tokens} | means


class AnswerRows(NamedTuple):
    """A model's outputs on the rows before answer tokens, prompt by prompt in their order."""

    logits: Tensor  # ``(T, V)``, T answer tokens
    targets: Tensor  # the tokens, ``(T,)``
    hidden: tuple[Tensor, ...] | None = None  # each layer's ``(B, S, hidden)``, if asked for

    def sums(self, layout: Layout) -> Sums:
        """Scores the answers of a batch: cross-entropy alone."""
        logits = self.logits.float()
        total = F.cross_entropy(logits, self.targets, reduction="sum")
        with torch.no_grad():
            correct = (logits.argmax(-1) == self.targets).sum()
        tokens = torch.tensor(len(self.targets), device=total.device)
        none = torch.zeros_like(total)
        return Sums(tokens, correct, (~layout.is_pad).sum(), total, total.detach(), none, none)


def answer_rows(model: nn.Module, batch: Batch, plan: Plan, hidden: bool = False) -> AnswerRows:
    """Runs a model and keeps the logits of the rows before answer tokens.

    The model has blocktune's attention attached, and may be wrapped by PEFT, DDP or DeepSpeed. A
    ValueError if it does not honour ``logits_to_keep``.
    """
    targets = batch.labels[:, 1:]
    # One index for all prompts of the batch: the rows before any prompt's answer tokens.
    keep = (targets != IGNORED).any(0).nonzero().squeeze(1)
    wanted: dict[str, Any] = {"use_cache": False, "logits_to_keep": keep}
    wanted |= {"output_hidden_states": True} if hidden else {}
    ids, positions = batch.input_ids, batch.layout.position
    output = model(input_ids=ids, position_ids=positions, plan=plan, **wanted)
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


@dataclass(frozen=True)
class Objective:
    """Computes the loss of a batch."""

    execution: str  # of attention
    distillation: Distillation  # what is learnt from the teacher
    # opens the teacher of a step, given the unwrapped student; None without one
    teacher: Callable[[nn.Module], AbstractContextManager[nn.Module]] | None = None
    rope: RopeSpec | None = None  # the model's frequencies, where keys are matched

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor], bare: nn.Module) -> Sums:
        """The loss of a collated batch; ``bare`` is the model unwrapped, for the teacher's pass."""
        student = batch_of(inputs)
        if self.teacher is None:
            plan = make_plan(self.execution, student.layout)
            return answer_rows(model, student, plan).sums(student.layout)
        how, teacher_batch = self.distillation, batch_of(inputs, "teacher_")
        # The teacher goes first: activation checkpointing runs the student's layers again later.
        with self.teacher(bare) as teacher:
            known, its_states = self._run(teacher, teacher_batch)
            probs = teacher_probs(known.logits, how.temperature, how.top_k)
            del known
        output, states = self._run(model, student)
        answers = output.sums(student.layout)
        apart = divergence(output.logits, probs, how.temperature)
        total = (1 - how.weight) * answers.total + how.weight * apart
        error = torch.zeros_like(total)
        if how.matches_states:
            error = self._error(student, teacher_batch, states, its_states)
            total = total + how.states_weight * error
        return answers._replace(total=total, divergence=apart.detach(), states=error.detach())

    def _run(self, model: nn.Module, batch: Batch) -> tuple[AnswerRows, Any]:
        """A model's outputs, and the states that are matched: a `Recorder`, hidden ones or None."""
        plan = make_plan(self.execution, batch.layout)
        if self.distillation.states == "kv":
            plan = Recorder(plan, question_rows(batch.layout))
            return answer_rows(model, batch, plan), plan
        output = answer_rows(model, batch, plan, self.distillation.states == "hidden")
        return output, output.hidden

    def _error(self, batch: Batch, teacher_batch: Batch, states: Any, its_states: Any) -> Tensor:
        own, other = question_rows(batch.layout), question_rows(teacher_batch.layout)
        if self.distillation.states == "hidden":
            errors = hidden_errors(states, its_states, own, other)
        else:
            shift = teacher_batch.layout.position[other] - batch.layout.position[own]
            errors = kv_errors(states, its_states, shift, self.rope)
        return (errors * row_weights(batch.layout, batch.labels, own)).sum()


def batch_of(inputs: dict[str, Tensor], prefix: str = "") -> Batch:
    """The student's rows of a collated batch, or the teacher's (``prefix="teacher_"``)."""
    layout = Layout.unpack(inputs[f"{prefix}layout"])
    return Batch(inputs[f"{prefix}input_ids"], layout, inputs[f"{prefix}labels"])
