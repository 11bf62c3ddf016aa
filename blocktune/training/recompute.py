"""Recompute-aware training: adds fresh rows for the tokens that serving would recompute."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from blocktune.attention import Plan, make_plan, planned_forward
from blocktune.layout import FOREVER, Kind, Layout, append_fresh
from blocktune.methods.select import SELECTORS, Selection
from blocktune.methods.select.base import LayerCheck, LayerKV
from blocktune.methods.select.layers import compared
from blocktune.parsing import parse_yaml
from blocktune.positions import RopeSpec
from blocktune.prompt import Prompt
from blocktune.registry import require_one_of

TRAINABLE = ("first-k", "random", "deviation")
"""Selectors that choose once, before the first layer or at a check layer."""
_BUDGETS = ("ratio", "share", "k", "last")  # parameters that a share of the tokens replaces


@dataclass(frozen=True)
class RecomputeSampler:
    """Chooses the fresh tokens of a prompt by one of the selectors `TRAINABLE`."""

    selection: Selection  # the selector; its budget is set per prompt
    low: float = 0.15  # smallest share of context tokens
    high: float = 0.15  # largest share; each prompt's share is drawn between the two

    @classmethod
    def named(cls, text: str, low: float, high: float) -> RecomputeSampler:
        """Builds a sampler from text such as ``deviation check_layer=2 by=values``."""
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"recompute_min <= recompute_max must be shares, got {low} and {high}")
        name, *words = text.split() or [""]
        require_one_of("recompute", name, TRAINABLE)
        parameters = {}
        for word in words:
            key, _, value = word.partition("=")
            if not (key and value):
                raise ValueError(f"recompute must be a selector and KEY=VALUE pairs, got '{text}'")
            if key in _BUDGETS:
                raise ValueError(f"'{word}' has no effect; set recompute_min and recompute_max")
            parameters[key] = parse_yaml(value, f"recompute {key}")
        selection = SELECTORS.build(name, **parameters)
        if selection.keeps_keys or selection.sees_future:
            raise ValueError("recompute: keeps_keys and sees_future are for serving only")
        return cls(selection, low, high)

    def selector(self, share: float, draw: random.Random | None = None) -> Selection:
        """The selector for one prompt. A random selector gets its seed from ``draw``."""
        selection = self.selection.with_budget(share)
        if draw is not None and hasattr(selection, "seed"):
            selection = replace(selection, seed=draw.getrandbits(31))
        return selection

    def check_layer(self, num_layers: int) -> int | None:
        """The layer at which the selector chooses; None: beforehand. ValueError: too few layers."""
        if (needed := self.selection.min_layers) > num_layers:
            raise ValueError(
                f"recompute needs a model of at least {needed} layers, this one has {num_layers}; "
                "lower its check_layer"
            )
        return next(iter(self.selection.checks(num_layers)), None)


def with_fresh_rows(prompt: Prompt, chosen: Tensor, until: int = FOREVER) -> Prompt:
    """Appends a fresh copy of each ``chosen`` row ``(1, S)`` bool to a prompt without fresh rows.

    ``until`` is the first layer (0-based) in which the fresh rows no longer exist.
    """
    rows = chosen[0].nonzero().flatten()
    ids = torch.cat([prompt.input_ids, prompt.input_ids[rows]])
    return Prompt(ids, append_fresh(prompt.layout, rows, until))


class _ProbeDone(Exception):
    """Ends a forward pass after the probed layer."""


@dataclass(frozen=True)
class Watched:
    """An attention plan that first shows the index of each layer, its keys and its values."""

    plan: Plan
    see: Callable[[int, Tensor, Tensor], None]

    def attend(self, query, key, value, rule, params) -> Tensor:
        """Implements `Plan.attend`."""
        self.see(rule.layer, key, value)
        return self.plan.attend(query, key, value, rule, params)


@torch.no_grad()
def narrowed(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    sampler: RecomputeSampler,
    rope: RopeSpec,
    execution: str,
    stop: bool = True,
) -> Layout:
    """The layout of a collated batch, in which only the chosen fresh rows stay in all layers.

    Up to the sampler's layer, every eligible token has a fresh row. There the selector chooses, by
    what the model caches of fresh and original rows. ``shares`` of the ``inputs`` ``(B, prompts)``
    is negative for packed prompts without a choice. With ``stop``, later layers are not run, which
    would leave sharded parameters gathered.
    """
    layout = Layout.unpack(inputs["layout"])
    num_layers = model.config.get_text_config().num_hidden_layers
    layer = sampler.check_layer(num_layers)

    def see(index: int, *_: Tensor) -> None:
        if stop and index == layer:  # whose keys are cached
            raise _ProbeDone

    plan, cache = Watched(make_plan(execution, layout), see), DynamicCache()
    with suppress(_ProbeDone):
        ids = inputs["input_ids"]
        planned_forward(model, ids, layout.position, plan, cache, logits_to_keep=1)
    cached = LayerKV(cache.layers[layer].keys, cache.layers[layer].values)
    states = compared(cached, rope.layers[layer])
    until = layout.until.clone()
    for row, sample in (inputs["shares"] >= 0).nonzero().tolist():
        check, fresh = _check(layout, states, layer, num_layers, row, sample)
        if len(fresh):
            selection = sampler.selector(float(inputs["shares"][row, sample]))
            until[row, fresh[selection.refine(check)[0]]] = FOREVER
    return replace(layout, until=until)


def _check(layout, states, layer, num_layers, row: int, sample: int) -> tuple[LayerCheck, Tensor]:
    """The input of a selector for one prompt, and its fresh rows ``(R,)`` in causal order."""
    entry = layout.map(lambda field: field[row : row + 1])
    in_prompt = ~entry.is_pad & (entry.sample == sample)
    fresh = (in_prompt & entry.is_fresh)[0].nonzero().flatten()
    fresh = fresh[entry.order[0, fresh].argsort(stable=True)]
    originals = entry.supersedes[0, fresh]

    def states_of(rows: Tensor) -> LayerKV:
        return LayerKV(*(state[row : row + 1, :, rows] for state in states))

    cached = in_prompt & (entry.is_encoded | (entry.kind == Kind.PREFIX))
    check = LayerCheck(
        layer=layer,
        num_layers=num_layers,
        eligible=torch.ones(1, len(fresh), dtype=torch.bool, device=layout.device),
        context_tokens=(in_prompt & entry.is_context).sum(1),
        cached_tokens=cached.sum(1),
        chunk=entry.chunk[:, fresh],
        question_mass=None,
        probe=lambda: (states_of(fresh), states_of(originals)),
    )
    return check, fresh
