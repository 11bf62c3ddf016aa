"""Where chunks stand, and how cached keys are moved there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

PLACEMENTS = ("sequential", "parallel", "composite")
FIXED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""RoPE types whose frequencies do not depend on the length of the prompt."""


class Placement(NamedTuple):
    """First position of each piece.

    Attributes:
        chunks: Of each chunk (with the links that belong to it).
        query: Of the query.
    """

    chunks: tuple[int, ...]
    query: int


def place(placement: str, prefix_length: int, chunk_lengths: Sequence[int]) -> Placement:
    """Positions at which the pieces of a prompt start.

    Args:
        placement: ``sequential`` (one after the other, as in an ordinary prompt), ``parallel``
            (every chunk right after the prefix, the query after the longest; APE) or
            ``composite`` (every chunk where it was encoded, from 0, and the query where the
            cache ends; TurboRAG).
        prefix_length: Tokens of the prefix.
        chunk_lengths: Tokens of each chunk, its links included.

    Raises:
        ValueError: If the placement is unknown.

    Source: APE arXiv:2502.05431 (parallel), TurboRAG arXiv:2410.07590 (composite).
    """
    total = prefix_length + sum(chunk_lengths)
    if placement == "sequential":
        ends = torch.tensor([prefix_length, *chunk_lengths]).cumsum(0).tolist()
        return Placement(tuple(ends[:-1]), total)
    if placement == "parallel":
        longest = max(chunk_lengths, default=0)
        return Placement((prefix_length,) * len(chunk_lengths), prefix_length + longest)
    if placement == "composite":
        return Placement((0,) * len(chunk_lengths), total)
    raise ValueError(f"unknown placement '{placement}'; available: {', '.join(PLACEMENTS)}")


@dataclass(frozen=True)
class RopeSpec:
    """The rotary frequencies of a model, layer by layer.

    Attributes:
        inv_freq: Per layer, radians per position, float32 ``(R / 2,)`` where ``R <= D`` is the
            number of rotated dimensions (the first ones of the head).
    """

    inv_freq: tuple[Tensor, ...]

    @classmethod
    def from_model(cls, model: PreTrainedModel) -> RopeSpec:
        """Reads the frequencies that the model itself rotates with.

        Raises:
            ValueError: If the model has no rotary embedding, or one whose frequencies depend
                on the prompt's length (dynamic, longrope): a rotated key cannot be moved then.
        """
        config = model.config.get_text_config()
        rotary = _find_rotary(model)
        if rotary is None:
            raise ValueError(
                f"{type(model).__name__} has no rotary position embedding; blocktune moves "
                "cached chunks by rotating their keys and needs a RoPE model"
            )
        if isinstance(rotary.rope_type, dict):  # Gemma 3: one set of frequencies a layer type
            kinds = config.layer_types
            for kind in set(kinds):
                _require_fixed(rotary.rope_type[kind], model)
            return cls(tuple(getattr(rotary, f"{kind}_inv_freq").float() for kind in kinds))
        _require_fixed(rotary.rope_type, model)
        return cls((rotary.inv_freq.float(),) * config.num_hidden_layers)


def _find_rotary(model: nn.Module) -> nn.Module | None:
    """The module that makes cos and sin for all layers; the text model's when there are more."""
    return next((m for name, m in model.named_modules() if name.endswith("rotary_emb")), None)


def _require_fixed(rope_type: str, model: PreTrainedModel) -> None:
    if rope_type not in FIXED_ROPE_TYPES:
        raise ValueError(
            f"{type(model).__name__} uses RoPE type '{rope_type}', whose frequencies change with "
            f"the prompt's length, so a rotated key cannot be moved; supported: "
            f"{', '.join(FIXED_ROPE_TYPES)} (set rope_parameters in the config if one of them fits)"
        )


def relocate_keys(keys: Tensor, shift: Tensor, inv_freq: Tensor) -> Tensor:
    """Moves cached keys to new positions by composing one more rotation.

    Rotations add up, so a key stored at position ``p`` becomes the key for ``p + shift``
    without the hidden state it came from. Cos and sin have unit norm: a factor that the model
    multiplies into them (YaRN's ``attention_scaling``) is in the key already and must not
    enter twice. Always start from the stored original; repeated moves pile up rounding.

    Args:
        keys: Rotated keys, ``(B, K, S, D)``, any floating dtype.
        shift: Signed distance to move each token, in positions, ``(B, S)``.
        inv_freq: The layer's frequencies, radians per position, ``(R / 2,)``, ``R <= D``; the
            dimensions after the first ``R`` are not rotated (partial rotary).

    Returns:
        Keys at the new positions, same shape and dtype. Computed in float32: bfloat16 cannot
        hold integers past 256, so position 257 would read as 256.

    Raises:
        ValueError: If ``shift`` does not match the keys.

    Source: Block-Attention, arXiv:2409.15355, position re-encoding (one rotation, not two).
    """
    if shift.shape != (keys.shape[0], keys.shape[2]):
        raise ValueError(
            f"shift must be (batch, tokens) = {(keys.shape[0], keys.shape[2])} to match keys, "
            f"got {tuple(shift.shape)}"
        )
    angle = shift[:, None, :, None].float() * inv_freq.float().to(keys.device)
    cos, sin = angle.cos().repeat(1, 1, 1, 2), angle.sin().repeat(1, 1, 1, 2)
    rotated, passed = keys.split([cos.shape[-1], keys.shape[-1] - cos.shape[-1]], dim=-1)
    left, right = rotated.float().chunk(2, dim=-1)
    moved = rotated.float() * cos + torch.cat((-right, left), dim=-1) * sin
    return torch.cat((moved.to(keys.dtype), passed), dim=-1)
