"""Distillation from full attention.

The teacher is the model with its adapter off, or another model. The student can learn the teacher's
next-token distributions, and its hidden states or keys and values on the question's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from blocktune.attention import Plan, attach
from blocktune.layout import Layout
from blocktune.models.identity import tokenizer_hash
from blocktune.models.load import load_base
from blocktune.models.sharded import loading_whole
from blocktune.positions import RopeSpec, relocate_keys
from blocktune.prompt import IGNORED
from blocktune.training.config import ObjectiveOptions

EPSILON = 1e-9

TeacherProbs = tuple[Tensor, Tensor | None]
"""Log-probabilities ``(T, k)`` float32 of token ids ``(T, k)``; None: of the whole vocabulary."""


def teacher_probs(logits: Tensor, temperature: float, top_k: int | None) -> TeacherProbs:
    """Distributions of logits ``(T, V)``, reduced to the ``top_k`` most likely tokens if set."""
    log_probs = torch.log_softmax(logits.float() / temperature, dim=-1)
    if top_k is None or top_k >= log_probs.shape[-1]:
        return log_probs, None
    return log_probs.topk(top_k, dim=-1)


def divergence(student: Tensor, teacher: TeacherProbs, temperature: float) -> Tensor:
    """Forward Kullback-Leibler divergence KL(teacher || student), summed over rows, in nats.

    With a top-k teacher all other tokens form one event. ``student`` are logits ``(T, V)``. The
    result is scaled by the square of the ``temperature`` (Hinton et al., 2015).
    """
    log_p, tokens = teacher
    log_q = torch.log_softmax(student.float() / temperature, dim=-1)
    if tokens is not None:
        log_q, log_p = _with_rest(log_q.gather(-1, tokens)), _with_rest(log_p)
    return (log_p.exp() * (log_p - log_q)).sum() * temperature**2


def _with_rest(log_probs: Tensor) -> Tensor:
    rest = (1 - log_probs.exp().sum(-1, keepdim=True)).clamp(min=EPSILON)
    return torch.cat((log_probs, rest.log()), dim=-1)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Puts a model in evaluation mode (no dropout, no checkpointing), without gradients."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextmanager
def as_teacher(model: nn.Module) -> Iterator[nn.Module]:
    """The unwrapped model as before training: adapter off, no dropout, no gradients."""
    off = model.disable_adapter() if hasattr(model, "peft_config") else nullcontext()
    with evaluating(model), off:
        yield model


Teacher = Callable[[nn.Module], AbstractContextManager[nn.Module]]
"""Context manager that gives the teacher of a step, from the unwrapped student."""


def find_teacher(
    options: ObjectiveOptions,
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    base_is_kept: bool,
) -> Teacher | None:
    """The teacher of a run, or None without distillation.

    ``base_is_kept``: the model without its adapter is the base, also after training. Raises
    ValueError if the teacher cannot be found, or does not fit the student.
    """
    if not options.has_teacher:
        return None
    if options.distill_teacher != "self":
        teacher = _load(options, model, tokenizer)
        return lambda student: nullcontext(teacher.to(next(student.parameters()).device))
    if not base_is_kept:
        raise ValueError(
            "distill_teacher 'self' is the model with its adapter off, which is not the base after "
            "full fine-tuning, with a trained bias or with PiSSA; name another model, or set "
            "use_peft or freeze_base without those"
        )
    return as_teacher


def _load(options: ObjectiveOptions, student: nn.Module, tokenizer) -> nn.Module:
    name, states = options.distill_teacher, options.distill_states
    with loading_whole():  # DeepSpeed gathers only the weights of the model that it trains
        teacher, teacher_tokenizer = load_base(name, place=False, what="distill_teacher")
    config, teacher_config = student.config.get_text_config(), teacher.config.get_text_config()
    same_tokens = tokenizer_hash(teacher_tokenizer) == tokenizer_hash(tokenizer)
    if not same_tokens or config.vocab_size != teacher_config.vocab_size:
        raise ValueError(
            f"distill_teacher '{name}' has another tokenizer, chat template or vocabulary than the "
            "student; use one of the same family (and link_mode 'table' for links)"
        )
    expected, actual = _shape(config, states), _shape(teacher_config, states)
    for part, value in expected.items() if options.matches_states else ():
        if actual[part] != value:
            raise ValueError(
                f"distill_states: the {part} of '{name}' is {actual[part]}, the student's "
                f"{value}; set distill_states: none"
            )
    attach(teacher)
    return teacher.eval().requires_grad_(False)


def _shape(config: PretrainedConfig, states: str) -> dict[str, Any]:
    layers = {"number of layers": config.num_hidden_layers}
    if states == "hidden":
        return layers | {"width": config.hidden_size}
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    # Keys are moved to the teacher's positions with the student's RoPE.
    kv = {"width of a head": width, "RoPE": config.rope_parameters}
    return layers | {"number of key heads": config.num_key_value_heads} | kv


States = dict[int, tuple[Tensor, ...]]
"""States to match, by layer: hidden ``(rows, hidden)``, or keys and values ``(rows, K, D)``."""


class Recorder:
    """An attention plan that records the keys and values of some rows."""

    def __init__(self, plan: Plan, rows: Tensor):
        """Records the rows ``(B, S)`` bool in every layer, while ``plan`` attends over all."""
        self.plan, self.rows = plan, rows
        self.states: States = {}

    def attend(self, query, key, value, rule, params) -> Tensor:
        """Implements `Plan.attend`."""
        pair = (key.transpose(1, 2)[self.rows], value.transpose(1, 2)[self.rows])
        # Activation checkpointing runs this twice; the second run must do the same operations.
        self.states.setdefault(rule.layer, pair)
        return self.plan.attend(query, key, value, rule, params)


def row_weights(layout: Layout, labels: Tensor, rows: Tensor) -> Tensor:
    """Weights of rows ``(rows,)`` float32 that sum to the number of answer tokens of a prompt.

    So losses do not depend on how examples are split into batches.
    """
    entry = torch.arange(len(labels), device=labels.device)[:, None]
    prompt = entry * (layout.sample.max() + 1) + layout.sample
    count = int(prompt.max()) + 1
    answers = torch.bincount(prompt[labels != IGNORED], minlength=count)
    selected = torch.bincount(prompt[rows], minlength=count)
    return (answers / selected.clamp(min=1))[prompt[rows]].float()


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance over the teacher's squared norm, of ``(rows, ...)``: ``(rows,)`` float32."""
    student, teacher = student.float().flatten(1), teacher.float().flatten(1)
    norm = teacher.square().sum(-1)
    return (student - teacher).square().sum(-1) / norm.clamp(min=EPSILON)


def state_errors(student: States, teacher: States, shift: Tensor, rope: RopeSpec | None) -> Tensor:
    """Relative error of the student's states of some rows, mean over layers and kinds: ``(rows,)``.

    With ``rope`` they are keys and values, and the student's keys are first moved by ``shift``
    ``(rows,)``, the distance from a row's position to its position for the teacher. Raises
    ValueError if no gradient can reach the student's states.
    """
    if torch.is_grad_enabled() and not any(own[0].requires_grad for own in student.values()):
        raise ValueError(
            "distill_states 'kv' gets no gradient under re-entrant activation checkpointing; set "
            "gradient_checkpointing_kwargs: {use_reentrant: false}"
        )
    errors: list[Tensor] = []
    for layer, own in student.items():
        if rope is not None:
            keys, values = own
            form = rope.layers[layer].of_keys(keys.shape[-1])
            keys = relocate_keys(keys.transpose(0, 1)[None], shift[None], form)[0].transpose(0, 1)
            own = keys, values
        errors += map(relative_error, own, teacher[layer])
    return torch.stack(errors).mean(0)
