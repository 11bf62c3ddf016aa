"""The loss of a step: cross-entropy on answers, and distillation from full attention.

The teacher is the model with its adapter off, or another model. The student can learn the teacher's
next-token distributions, and its hidden states or keys and values on the question's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from blocktune.attention import Plan, attach, make_plan, planned_forward
from blocktune.layout import Kind, Layout
from blocktune.models.identity import tokenizer_hash
from blocktune.models.load import load_base
from blocktune.models.sharded import loading_whole
from blocktune.positions import RopeSpec, relocate_keys
from blocktune.prompt import IGNORED, Batch
from blocktune.training.config import ObjectiveOptions
from blocktune.training.recompute import Watched

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
    """Forward KL(teacher || student) of logits ``(T, V)``, summed over rows, in nats.

    With a top-k teacher all other tokens form one event. The result is scaled by the square of the
    ``temperature`` (Hinton et al., 2015).
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
    """The teacher of a run, or None without distillation; ValueError if it does not fit.

    ``base_is_kept``: the model without its adapter is the base, also after training.
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
    if options.matches_states and actual != expected:
        raise ValueError(f"distill_states: '{name}' has {actual}, the student {expected}")
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


# By layer: hidden states ``(rows, hidden)``, or keys and values ``(rows, K, D)``.
States = dict[int, tuple[Tensor, ...]]


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
    """
    targets = batch.labels[:, 1:]
    # One index for the whole batch: the rows that predict an answer token of any prompt.
    keep = (targets != IGNORED).any(0).nonzero().squeeze(1)
    options = {"output_hidden_states": True} if hidden else {}
    ids, positions = batch.input_ids, batch.layout.position
    output = planned_forward(model, ids, positions, plan, logits_to_keep=keep, **options)
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
            states: States = {}

            def record(layer: int, key: Tensor, value: Tensor) -> None:
                pair = (key.transpose(1, 2)[rows], value.transpose(1, 2)[rows])
                # Activation checkpointing runs this twice, and must do the same operations.
                states.setdefault(layer, pair)

            return answer_rows(model, batch, Watched(plan, record)), states
        output = answer_rows(model, batch, plan, self.options.distill_states == "hidden")
        # The first are the embeddings.
        return output, {i: (h[rows],) for i, h in enumerate(output.hidden[1:])}


def batch_of(inputs: dict[str, Tensor], prefix: str = "") -> Batch:
    """The student's rows of a collated batch, or the teacher's (``prefix="teacher_"``)."""
    layout = Layout.unpack(inputs[f"{prefix}layout"])
    return Batch(inputs[f"{prefix}input_ids"], layout, inputs[f"{prefix}labels"])
