"""The loss of a step: cross-entropy, and divergence from a teacher and its states."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from blocktune.attention import Plan, make_plan, planned_forward
from blocktune.layout import Kind, Layout
from blocktune.positions import RopeSpec
from blocktune.prompt import IGNORED, Batch
from blocktune.training.config import ObjectiveOptions
from blocktune.training.distillation import (
    Recorder,
    States,
    Teacher,
    divergence,
    row_weights,
    state_errors,
    teacher_probs,
)


class Sums(NamedTuple):
    """Sums over answer tokens: of one batch (tensors), or of all since the last log (numbers)."""

    tokens: Any = 0.0  # number of answer tokens
    correct: Any = 0.0  # number of those that were the most likely token
    rows: Any = 0.0  # rows of the batch that are not padding
    total: Any = 0.0  # the loss, in nats; as a tensor it is float32 and differentiable
    cross_entropy: Any = 0.0  # in nats
    divergence: Any = 0.0  # from the teacher over answer rows, in nats; 0 without a teacher
    states: Any = 0.0  # weighted errors of the states; 0 if they are not matched

    def means(self, has_teacher: bool) -> dict[str, float]:
        """Means per answer token. The parts of the loss are included only with a teacher."""
        if not self.tokens:
            return {}
        names = ("cross_entropy", "divergence", "states") if has_teacher else ()
        means = {name: getattr(self, name) / self.tokens for name in names}
        return {"mean_token_accuracy": self.correct / self.tokens} | means


class AnswerRows(NamedTuple):
    """A model's outputs on the rows that predict answer tokens, ordered by prompt."""

    logits: Tensor  # ``(T, V)``, T answer tokens
    targets: Tensor  # the tokens, ``(T,)``
    hidden: tuple[Tensor, ...] = ()  # embeddings and each layer's ``(B, S, hidden)``, if asked for

    def sums(self, layout: Layout) -> Sums:
        """Sums the cross-entropy and accuracy of a batch; nothing from a teacher."""
        logits = self.logits.float()
        total = F.cross_entropy(logits, self.targets, reduction="sum")
        with torch.no_grad():
            correct = (logits.argmax(-1) == self.targets).sum()
        tokens = torch.tensor(len(self.targets), device=total.device)
        none = torch.zeros_like(total)
        return Sums(tokens, correct, (~layout.is_pad).sum(), total, total.detach(), none, none)


def answer_rows(model: nn.Module, batch: Batch, plan: Plan, hidden: bool = False) -> AnswerRows:
    """Runs a model and returns its outputs on the rows that predict answer tokens.

    The model has blocktune's attention attached, and may be wrapped by PEFT, DDP or DeepSpeed.
    Raises ValueError if it ignores ``logits_to_keep``.
    """
    targets = batch.labels[:, 1:]
    # One index for the whole batch: the rows that predict an answer token of any prompt.
    keep = (targets != IGNORED).any(0).nonzero().squeeze(1)
    options = {"output_hidden_states": True} if hidden else {}
    ids, positions = batch.input_ids, batch.layout.position
    output = planned_forward(model, ids, positions, plan, logits_to_keep=keep, **options)
    if output.logits.shape[1] != keep.numel():
        raise ValueError(
            f"the model returned logits of {output.logits.shape[1]} rows, not {keep.numel()}; its "
            "forward must support logits_to_keep"
        )
    targets = targets[:, keep]
    is_answer = targets != IGNORED
    states = output.hidden_states if hidden else ()
    return AnswerRows(output.logits[is_answer], targets[is_answer], states)


@dataclass(frozen=True)
class Objective:
    """Computes the loss of a batch."""

    execution: str  # of attention: ``split``, ``flex`` or ``dense``
    options: ObjectiveOptions  # what to learn from the teacher
    teacher: Teacher | None  # None without distillation
    rope: RopeSpec  # of the model, to match keys

    def __call__(self, model: nn.Module, inputs: dict[str, Tensor], bare: nn.Module) -> Sums:
        """The loss of a collated batch. ``bare`` is the unwrapped model, for the teacher."""
        student = batch_of(inputs)
        if self.teacher is None:
            plan = make_plan(self.execution, student.layout)
            return answer_rows(model, student, plan).sums(student.layout)
        options, teacher_batch = self.options, batch_of(inputs, "teacher_")
        weight, temperature = options.distill_weight, options.distill_temperature
        # The teacher runs first, since checkpointing runs the student's layers again in backward.
        with self.teacher(bare) as teacher, torch.no_grad():
            teacher_output, teacher_states = self._run(teacher, teacher_batch)
            probs = teacher_probs(teacher_output.logits, temperature, options.distill_top_k)
            del teacher_output
        output, states = self._run(model, student)
        answers = output.sums(student.layout)
        kl = divergence(output.logits, probs, temperature)
        total = (1 - weight) * answers.total + weight * kl
        error = torch.zeros_like(total)
        if options.matches_states:
            own, other = (b.layout.kind == Kind.QUERY for b in (student, teacher_batch))
            shift = teacher_batch.layout.position[other] - student.layout.position[own]
            rope = self.rope if options.distill_states == "kv" else None
            errors = state_errors(states, teacher_states, shift, rope)
            error = (errors * row_weights(student.layout, student.labels, own)).sum()
            total = total + options.distill_states_weight * error
        return answers._replace(total=total, divergence=kl.detach(), states=error.detach())

    def _run(self, model: nn.Module, batch: Batch) -> tuple[AnswerRows, States]:
        """A model's outputs, and the states of the question's rows that are to match."""
        plan, rows = make_plan(self.execution, batch.layout), batch.layout.kind == Kind.QUERY
        if self.options.distill_states == "kv":
            plan = Recorder(plan, rows)
            return answer_rows(model, batch, plan), plan.states
        output = answer_rows(model, batch, plan, self.options.distill_states == "hidden")
        # The first are the embeddings.
        return output, {i: (h[rows],) for i, h in enumerate(output.hidden[1:])}


def batch_of(inputs: dict[str, Tensor], prefix: str = "") -> Batch:
    """The student's rows of a collated batch, or the teacher's (``prefix="teacher_"``)."""
    layout = Layout.unpack(inputs[f"{prefix}layout"])
    return Batch(inputs[f"{prefix}input_ids"], layout, inputs[f"{prefix}labels"])
