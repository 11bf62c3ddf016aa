"""Which tokens are fresh in training: chosen by the very selectors that serving uses."""

from __future__ import annotations

import dataclasses
import random
from dataclasses import dataclass, replace

import yaml

from blocktune.select import SELECTORS, Selection


@dataclass(frozen=True)
class RecomputeSampler:
    """Chooses the tokens of a prompt that are fresh, as a selector of `blocktune.select` does.

    Attributes:
        selection: The selector; its budget is set per prompt.
        low: Smallest share of the context tokens.
        high: Largest share; a prompt's own is drawn between the two.

    Raises:
        ValueError: If the shares are out of range, or the selector asks for more than keys at
            one layer.
    """

    selection: Selection
    low: float = 0.15
    high: float = 0.15

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
        """The sampler of a selector as one says it: ``deviation check_layer=2 by=values``.

        Raises:
            ValueError: If a word is no ``key=value``, or as the selector does.
        """
        name, *words = text.split() or [""]
        pairs = [word.partition("=") for word in words]
        for key, equals, value in pairs:
            if not (key and equals and value):
                raise ValueError(f"recompute: a selector and KEY=VALUE pairs, got '{text}'")
        parameters = {key: yaml.safe_load(value) for key, _, value in pairs}
        return cls(SELECTORS.build(name, **parameters), low, high)

    def share(self, draw: random.Random) -> float:
        """The share of one prompt."""
        return draw.uniform(self.low, self.high)

    def selector(self, share: float, draw: random.Random | None = None) -> Selection:
        """The selector of one prompt; one that draws itself gets its seed from ``draw``."""
        selection = self.selection.with_budget(share)
        if draw is not None and "seed" in {field.name for field in dataclasses.fields(selection)}:
            selection = replace(selection, seed=draw.getrandbits(31))
        return selection

    def check_layer(self, num_layers: int) -> int | None:
        """Layer at which the choice is narrowed, or None where it is made beforehand.

        Raises:
            ValueError: If the selector is asked more than once, or adds rows on the way up.
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
