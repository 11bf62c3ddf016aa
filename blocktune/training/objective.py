"""The loss of a step: cross-entropy, divergence from a teacher, and the states in between."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from blocktune.attention import make_plan
from blocktune.layout import Layout
from blocktune.positions import RopeSpec
from blocktune.prompt import Batch
from blocktune.training.distillation import Beliefs, Distillation, beliefs, divergence
from blocktune.training.loss import AnswerLoss, answer_rows
from blocktune.training.states import (
    Recorder,
    hidden_errors,
    kv_errors,
    question_rows,
    row_weights,
)


class StepLoss(NamedTuple):
    """Sums over the answer tokens of a batch.

    Attributes:
        total: What is minimised, differentiable.
        answers: Cross-entropy, counts of tokens.
        divergence: Sum over answer rows in nats; 0 without a teacher.
        states: Weighted sum of the states' errors; 0 where they are not matched.
    """

    total: Tensor
    answers: AnswerLoss
    divergence: Tensor
    states: Tensor


class Lesson(NamedTuple):
    """What is kept of a teacher's forward pass."""

    beliefs: Beliefs
    recorder: Recorder | None
    hidden: tuple[Tensor, ...] | None


@dataclass(frozen=True)
class Objective:
    """Computes the loss of a batch.

    Attributes:
        execution: Of attention.
        distillation: What is learnt from the teacher.
        teacher: Opens the teacher of a step, given the unwrapped student; None without one.
        rope: The model's frequencies, where keys are matched.
    """

    execution: str
    distillation: Distillation
    teacher: Callable[[nn.Module], AbstractContextManager[nn.Module]] | None = None
    rope: RopeSpec | None = None

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor], bare: nn.Module) -> StepLoss:
        """The loss of a collated batch.

        Args:
            model: The student, as gradients want it (wrapped by DDP or DeepSpeed).
            inputs: See `blocktune.training.collator`.
            bare: The same model unwrapped, for the teacher's forward.
        """
        student = batch_of(inputs)
        if self.teacher is None:
            plan = make_plan(self.execution, student.layout)
            answers = answer_rows(model, student, plan).cross_entropy()
            none = torch.zeros_like(answers.total)
            return StepLoss(answers.total, answers, none, none)
        taught = batch_of(inputs, "teacher_")
        # The teacher goes first: activation checkpointing runs the student's layers again later.
        with self.teacher(bare) as teacher:
            lesson = self._lesson(teacher, taught)
        return self._learn(model, student, taught, lesson)

    def _lesson(self, teacher: nn.Module, batch: Batch) -> Lesson:
        how = self.distillation
        plan, recorder = self._plan(batch)
        said = answer_rows(teacher, batch, plan, how.states == "hidden")
        return Lesson(beliefs(said.logits, how.temperature, how.top_k), recorder, said.hidden)

    def _learn(self, model: nn.Module, batch: Batch, taught: Batch, lesson: Lesson) -> StepLoss:
        how = self.distillation
        plan, recorder = self._plan(batch)
        said = answer_rows(model, batch, plan, how.states == "hidden")
        answers = said.cross_entropy()
        apart = divergence(said.logits, lesson.beliefs, how.temperature)
        total = (1 - how.weight) * answers.total + how.weight * apart
        states = torch.zeros_like(total)
        if how.matches_states:
            states = self._states(batch, taught, recorder, said.hidden, lesson)
            total = total + how.states_weight * states
        return StepLoss(total, answers, apart.detach(), states.detach())

    def _plan(self, batch: Batch):
        """The plan of a batch, and its recorder where keys and values are matched."""
        plan = make_plan(self.execution, batch.layout)
        if self.distillation.states != "kv":
            return plan, None
        recorder = Recorder(plan, question_rows(batch.layout))
        return recorder, recorder

    def _states(self, batch: Batch, taught: Batch, recorder, hidden, lesson: Lesson) -> Tensor:
        own, other = question_rows(batch.layout), question_rows(taught.layout)
        if recorder is None:
            errors = hidden_errors(hidden, lesson.hidden, own, other)
        else:
            shift = taught.layout.position[other] - batch.layout.position[own]
            errors = kv_errors(recorder, lesson.recorder, shift, self.rope)
        return (errors * row_weights(batch.layout, batch.labels, own)).sum()


def batch_of(inputs: dict[str, Tensor], prefix: str = "") -> Batch:
    """The student's rows of a collated batch, or the teacher's (``prefix="teacher_"``)."""
    layout = Layout.unpack(inputs[f"{prefix}layout"])
    return Batch(inputs[f"{prefix}input_ids"], layout, inputs[f"{prefix}labels"])
