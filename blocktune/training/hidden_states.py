"""States of the question's rows, recorded and compared between a student and its teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from blocktune.attention import Plan
from blocktune.attention.kernels import AttentionParams
from blocktune.layout import Kind, LayerRule, Layout
from blocktune.positions import RopeSpec, relocate_keys
from blocktune.prompt import IGNORED

EPSILON = 1e-9


class Recorder:
    """A plan that keeps the keys and values of some rows of every layer.

    Attributes:
        states: By layer, keys and values ``(rows, K, D)``.
    """

    def __init__(self, plan: Plan, rows: Tensor):
        """Records ``rows`` ``(B, S)`` bool of what ``plan`` attends over."""
        self.plan, self.rows = plan, rows
        self.states: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, rule: LayerRule, params: AttentionParams
    ) -> Tensor:
        """See `Plan.attend`."""
        pair = (key.transpose(1, 2)[self.rows], value.transpose(1, 2)[self.rows])
        # Activation checkpointing attends a second time, and must find the same operations.
        self.states.setdefault(rule.layer, pair)
        return self.plan.attend(query, key, value, rule, params)


def question_rows(layout: Layout) -> Tensor:
    """Rows whose states are matched: the question's, ``(B, S)`` bool."""
    return layout.kind == Kind.QUERY


def row_weights(layout: Layout, labels: Tensor, rows: Tensor) -> Tensor:
    """Weight of each row so that a prompt counts by its answer tokens, ``(rows,)`` float32.

    The sum of the weights is the number of answer tokens, which losses are divided by: cutting a
    batch in another way changes nothing.
    """
    entry = torch.arange(len(labels), device=labels.device)[:, None]
    prompt = entry * (layout.sample.max() + 1) + layout.sample
    count = int(prompt.max()) + 1
    answers = torch.bincount(prompt[labels != IGNORED], minlength=count)
    asked = torch.bincount(prompt[rows], minlength=count)
    return (answers / asked.clamp(min=1))[prompt[rows]].float()


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance over the teacher's squared norm: ``(rows, ...)`` to ``(rows,)`` float32."""
    student, teacher = student.float().flatten(1), teacher.float().flatten(1)
    norm = teacher.square().sum(-1)
    return (student - teacher).square().sum(-1) / norm.clamp(min=EPSILON)


def relocated(keys: Tensor, shift: Tensor, rope: RopeSpec, layer: int) -> Tensor:
    """Keys ``(rows, K, D)`` moved by ``shift`` ``(rows,)`` positions, differentiably."""
    moved = relocate_keys(keys.transpose(0, 1)[None], shift[None], rope.inv_freq[layer])
    return moved[0].transpose(0, 1)


def kv_errors(student: Recorder, teacher: Recorder, shift: Tensor, rope: RopeSpec) -> Tensor:
    """How far the student's keys and values are from the teacher's, mean over layers, ``(rows,)``.

    Args:
        student: Recorded under the student's layout.
        teacher: Recorded under the teacher's, the same rows in the same order.
        shift: Positions from the student's place of each row to the teacher's, ``(rows,)``;
            keys are moved by it first, so that a place alone is no error.
        rope: The model's frequencies.

    Raises:
        ValueError: If no gradient can reach the student's states.
    """
    if torch.is_grad_enabled() and not any(k.requires_grad for k, _ in student.states.values()):
        raise ValueError(
            "distill_states 'kv' gets no gradient under re-entrant activation checkpointing; set "
            "gradient_checkpointing_kwargs: {use_reentrant: false}, or distill_states: hidden"
        )
    errors = []
    for layer, (keys, values) in student.states.items():
        other_keys, other_values = teacher.states[layer]
        errors.append(relative_error(relocated(keys, shift, rope, layer), other_keys))
        errors.append(relative_error(values, other_values))
    return torch.stack(errors).mean(0)


def hidden_errors(
    student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], own: Tensor, other: Tensor
) -> Tensor:
    """How far hidden states are apart, mean over layers, ``(rows,)``.

    Args:
        student: ``output_hidden_states`` of the student, each ``(B, S, hidden)``; the first is the
            embeddings' and left out.
        teacher: The teacher's.
        own: Rows of the student's layout, ``(B, S)`` bool.
        other: The same rows in the teacher's layout.
    """
    pairs = zip(student[1:], teacher[1:], strict=True)
    return torch.stack([relative_error(a[own], b[other]) for a, b in pairs]).mean(0)
