"""What a run costs, estimated before it starts: operations, memory, time."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
from torch import nn

from blocktune.models.sharded import num_elements, whole_shape

ADAM_BYTES = 8
"""Two float32 moments a trainable parameter."""
HIDDEN_COPIES = 12
"""States of the model's width that a layer keeps per row for backward: norms, q, k, v, output,
residuals and their upcasts. Estimated; a kernel may keep fewer."""
FFN_COPIES = 4
"""The same of the feed-forward width: gate, up, activation, product."""
LOGIT_BYTES = 12
"""Logits, their log-softmax and its gradient in float32, per answer row and vocabulary entry."""
EFFICIENCY = 0.4
"""Share of the measured matmul rate that a training step is expected to reach."""


@dataclass(frozen=True)
class Size:
    """A model's sizes that matter to cost.

    Attributes:
        matmul: Weights that every row is multiplied with; active experts only, no output head.
        trained: Those of them that get gradients.
        layers: Decoder layers.
        hidden: Width.
        ffn: Width inside the feed-forward part.
        vocab: Vocabulary entries.
        weight_bytes: All parameters as they are stored.
        trainable: Parameters that get gradients.
        gradient_bytes: Their gradients.
        state_bytes: Of one number in an activation.
    """

    matmul: int
    trained: int
    layers: int
    hidden: int
    ffn: int
    vocab: int
    weight_bytes: int
    trainable: int
    gradient_bytes: int
    state_bytes: int


def size_of(model: nn.Module, state_bytes: int) -> Size:
    """Reads the sizes off a model that is ready to train."""
    config = model.config.get_text_config()
    head = model.get_output_embeddings()
    linear = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    # Shapes, not storage: the codes of a 4-bit weight are half a byte each.
    matmul = sum(m.in_features * m.out_features for m in linear)
    trained = sum(m.in_features * m.out_features for m in linear if m.weight.requires_grad)
    shapes = [whole_shape(p) for p in model.parameters()]
    active = getattr(config, "num_experts_per_tok", None) or 1
    matmul += sum(math.prod(shape[1:]) * active for shape in shapes if len(shape) == 3)
    learnt = [p for p in model.parameters() if p.requires_grad]
    return Size(
        matmul=matmul,
        trained=trained,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        ffn=getattr(config, "moe_intermediate_size", None) or config.intermediate_size,
        vocab=config.vocab_size,
        weight_bytes=sum(num_elements(p) * p.element_size() for p in model.parameters()),
        trainable=sum(num_elements(p) for p in learnt),
        gradient_bytes=sum(num_elements(p) * p.element_size() for p in learnt),
        state_bytes=state_bytes,
    )


def row_flops(size: Size, has_teacher: bool) -> float:
    """Operations per row of a step: forward, backward to the states, gradients of what is trained.

    Products with weights only: attention's own, the output head on answer rows and activation
    checkpointing are left out, so a utilisation from it is a lower bound.
    """
    return 4.0 * size.matmul + 2.0 * size.trained + (2.0 * size.matmul if has_teacher else 0.0)


def peak_bytes(
    size: Size, rows: float, answer_rows: int, checkpointing: bool, mask_cells: float = 0.0
) -> float:
    """Expected peak of one process without sharding: weights, gradients, Adam, states, masks.

    Args:
        size: Of the model.
        rows: Rows of the largest batch, padding included.
        answer_rows: Rows of it that get logits.
        checkpointing: Whether only each layer's input is kept, and one layer in full.
        mask_cells: Elements of attention masks that are kept.
    """
    fixed = size.weight_bytes + size.gradient_bytes + ADAM_BYTES * size.trainable
    layer = HIDDEN_COPIES * size.hidden + FFN_COPIES * size.ffn
    kept = size.layers * size.hidden + layer if checkpointing else size.layers * layer
    states = (rows * kept + mask_cells) * size.state_bytes
    return fixed + states + answer_rows * size.vocab * LOGIT_BYTES


@torch.no_grad()
def matmul_rate(device: torch.device | str, dtype: torch.dtype, seconds: float = 0.05) -> float:
    """Operations per second of plain matrix products here, the best of some.

    What a training step is compared with: no table of data sheets names every machine.
    """
    device = torch.device(device)
    side = 4096 if device.type == "cuda" else 384
    left = torch.ones(side, side, device=device, dtype=dtype)
    best, started = 0.0, time.perf_counter()
    while time.perf_counter() - started < seconds or not best:
        _wait(device)
        begin = time.perf_counter()
        left @ left
        _wait(device)
        best = max(best, 2.0 * side**3 / max(time.perf_counter() - begin, 1e-9))
    return best


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
