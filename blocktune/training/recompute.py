"""Recompute-aware training: the rows that serving recomputes, chosen by the same selectors."""

from __future__ import annotations

import dataclasses
import random
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from blocktune.attention import Plan, make_plan
from blocktune.layout import FOREVER, GLOBAL, Kind, Layout
from blocktune.methods.select import SELECTORS, Selection
from blocktune.methods.select.base import LayerCheck, LayerKV
from blocktune.parsing import parse_yaml
from blocktune.prompt import Prompt


@dataclass(frozen=True)
class RecomputeSampler:
    """Chooses the fresh tokens of a prompt by a selector of `blocktune.methods.select`.

    Raises:
        ValueError: If the shares are out of range, or the selector asks for more than keys at
            one layer.
    """

    selection: Selection  # the selector; its budget is set per prompt
    low: float = 0.15  # smallest share of the context tokens
    high: float = 0.15  # largest share; a prompt's own is drawn between the two

    def __post_init__(self):
        if not 0.0 <= self.low <= self.high <= 1.0:
            raise ValueError(
                f"recompute_min and recompute_max must be shares with min <= max, got {self.low} "
                f"and {self.high}"
            )
        self.selection.with_budget(self.low)  # refuses what has no share to set
        asks_a_model = type(self.selection).begin is not Selection.begin
        if asks_a_model or self.selection.watches_chunks:
            raise ValueError(
                f"recompute '{SELECTORS.name_of(self.selection)}' chooses by a pass over a served "
                "prompt; training can follow first-k, random and deviation"
            )

    @classmethod
    def named(cls, text: str, low: float, high: float) -> RecomputeSampler:
        """The sampler of a selector written as ``deviation check_layer=2 by=values``."""
        name, *words = text.split() or [""]
        pairs = [word.partition("=") for word in words]
        for key, equals, value in pairs:
            if not (key and equals and value):
                raise ValueError(f"recompute must be a selector and KEY=VALUE pairs, got '{text}'")
        parameters = {key: parse_yaml(value, f"recompute {key}") for key, _, value in pairs}
        return cls(SELECTORS.build(name, **parameters), low, high)

    def selector(self, share: float, draw: random.Random | None = None) -> Selection:
        """The selector of one prompt; one that draws itself gets its seed from ``draw``."""
        selection = self.selection.with_budget(share)
        if draw is not None and "seed" in {field.name for field in dataclasses.fields(selection)}:
            selection = replace(selection, seed=draw.getrandbits(31))
        return selection

    def check_layer(self, num_layers: int) -> int | None:
        """Layer at which the choice is narrowed, or None where it is made beforehand.

        Raises ValueError if the selector is asked more than once, or adds rows on the way up.
        """
        chosen = self.selection
        checks = chosen.checks(num_layers)
        keeps = chosen.keeps_keys or chosen.sees_future
        if len(checks) > 1 or chosen.widens(num_layers) or keeps:
            raise ValueError(
                f"recompute '{SELECTORS.name_of(chosen)}' chooses at several layers, or leaves "
                "states behind where it drops rows; training can follow a choice made before the "
                "first layer (first-k, random) or once at a layer (deviation)"
            )
        return checks[0] if checks else None


def with_fresh_rows(prompt: Prompt, chosen: Tensor, until: int = FOREVER) -> Prompt:
    """Appends a fresh row for each ``chosen`` one ``(1, S)`` of a prompt that has none yet.

    ``until`` is the first layer (0-based) in which the fresh rows no longer exist.
    """
    rows = chosen[0].nonzero().flatten()
    second = prompt.layout.map(lambda field: field[:, rows])
    second = replace(
        second,
        group=torch.full_like(second.group, GLOBAL),
        supersedes=rows[None],
        until=torch.full_like(second.until, until),
    )
    joined = torch.cat([prompt.layout.pack(), second.pack()], dim=1)
    ids = torch.cat([prompt.input_ids, prompt.input_ids[rows]])
    return Prompt(ids, Layout.unpack(joined))


class _Seen(Exception):
    """Ends a forward pass: what was wanted of it is there."""


class _Probe:
    """A plan that keeps one layer's keys and values, and may end the forward pass there."""

    def __init__(self, plan: Plan, layer: int, stop: bool):
        self.plan, self.layer, self.stop = plan, layer, stop
        self.states: LayerKV | None = None

    def attend(self, query, key, value, rule, params) -> Tensor:
        if rule.layer == self.layer:
            self.states = LayerKV(key, value)
            if self.stop:
                raise _Seen
        return self.plan.attend(query, key, value, rule, params)


@torch.no_grad()
def states_at(
    model: nn.Module,
    input_ids: Tensor,
    layout: Layout,
    layer: int,
    execution: str,
    stop: bool = True,
) -> LayerKV:
    """Keys and values ``(B, K, S, D)`` that a layer (0-based) makes of all rows ``(B, S)``.

    ``stop`` leaves out the layers above. Not where parameters are sharded over processes: a forward
    pass that ends halfway leaves them gathered.
    """
    probe = _Probe(make_plan(execution, layout), layer, stop)
    with suppress(_Seen):
        options = {"plan": probe, "use_cache": False, "logits_to_keep": 1}
        model(input_ids=input_ids, position_ids=layout.position, **options)
    assert probe.states is not None, f"the model has no attention layer {layer}"
    return probe.states


def narrowed(
    layout: Layout,
    states: LayerKV,
    layer: int,
    num_layers: int,
    sampler: RecomputeSampler,
    shares: Tensor,
) -> Layout:
    """Lets the chosen fresh rows live in all layers; the others end at ``layer``.

    In the layout ``(B, S)`` every eligible token has a fresh row until ``layer``. The selector of
    ``sampler`` chooses by the ``states`` of all rows there. ``shares`` ``(B, prompts)`` has one for
    each packed prompt, negative where there is nothing to choose.
    """
    until = layout.until.clone()
    for row, sample in (shares >= 0).nonzero().tolist():
        check, fresh = _check(layout, states, layer, num_layers, row, sample)
        if len(fresh):
            selection = sampler.selector(float(shares[row, sample]))
            until[row, fresh[selection.refine(check)[0]]] = FOREVER
    return replace(layout, until=until)


def _check(layout, states, layer, num_layers, row: int, sample: int) -> tuple[LayerCheck, Tensor]:
    """What a selector is shown of one prompt, and its fresh rows ``(R,)`` in causal order."""
    facts = layout.map(lambda field: field[row : row + 1])
    here = ~facts.is_pad & (facts.sample == sample)
    fresh = (here & facts.is_fresh)[0].nonzero().flatten()
    fresh = fresh[facts.order[0, fresh].argsort(stable=True)]
    originals = facts.supersedes[0, fresh]

    def taken(rows: Tensor) -> LayerKV:
        return LayerKV(*(state[row : row + 1, :, rows] for state in states))

    computed = (Kind.BLANK, Kind.ANSWER, Kind.QUERY, Kind.LINK)
    cached = here & ~facts.is_fresh & ~sum(facts.kind == kind for kind in computed).bool()
    check = LayerCheck(
        layer=layer,
        num_layers=num_layers,
        eligible=torch.ones(1, len(fresh), dtype=torch.bool, device=layout.device),
        context_tokens=(here & facts.is_context).sum(1),
        cached_tokens=cached.sum(1),
        chunk=facts.chunk[:, fresh],
        question_mass=None,
        probe=lambda: (taken(fresh), taken(originals)),
    )
    return check, fresh
