"""Tests on a small random model for the properties that chunk reuse needs."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from contextlib import ExitStack
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from blocktune.attention import DensePlan, attach, planned_forward
from blocktune.attention.interface import decoder_of
from blocktune.layout import FOREVER, GLOBAL, NO_CHUNK, NO_ROW, Kind, LayerRule, Layout
from blocktune.models.small import VOCABULARY
from blocktune.positions import LayerRope, relocate_keys

TOLERANCE = 1e-3  # of a state's largest element: rounding is below, a wrong mask or rotation above
POSITIONS = (3, 4, 11, 64, 901)
ROWS = 40


class Refused(ValueError):
    """Chunk reuse would be wrong on the model. The message names the missing property."""


class Mixes(Refused):
    """The model mixes tokens by other means than attention, such as a recurrence."""


class NoRotary(Mixes):
    """The model only attends, but positions are no rotations. It can resume prefixes."""


class Rotated(NamedTuple):
    """A `LayerRope` with the frequencies in a decoder's ``buffer`` (""; none) times ``sign``."""

    buffer: str
    sign: int = 1
    start: int = 0
    interleaved: bool = False
    in_values: bool = False

    def rope(self, buffers: Mapping[str, Tensor]) -> LayerRope:
        """The `LayerRope`, given the decoder's buffers."""
        if not self.buffer:
            return LayerRope(torch.empty(0), *self[2:])
        # Types `dynamic` and `longrope` overwrite the frequencies in every pass, by its length.
        original = self.buffer.replace("inv_freq", "original_inv_freq")
        return LayerRope(self.sign * buffers.get(original, buffers[self.buffer]).float(), *self[2:])


class Structure(NamedTuple):
    """Result of `blocktune.models.gate.examine`."""

    layers: tuple[Rotated, ...]  # how each layer rotates its keys
    windows: tuple[int | None, ...]  # sliding window of each layer, in tokens
    max_tokens: int | None  # length up to which reuse is exact, None without such a limit


NO_ROTARY = (
    "{} has no rotary position embedding (RoPE), or adds positions to its states as well; cached "
    "chunks are moved by rotating their keys: use a RoPE model, or in `blocktune answer` use "
    "recycle, prefix-cache, full-prefill or no-context"
)


def mixes_tokens(name: str, what: str, layer: int, count: int = 1) -> str:
    """Error for a model in which ``layer`` (and ``count - 1`` more) do more than attend."""
    more = f" and {count - 1} more" if count > 1 else ""
    return (
        f"{name}: {what} in layer {layer}{more} mixes tokens by other means than masked attention "
        "(such as a recurrence, a convolution or its own token selection), so a chunk's states "
        "depend on the text before it; use a decoder that only attends, or `blocktune answer` with "
        "a method that reuses no chunks (full-prefill, no-context, prefix-cache)"
    )


def without_keys(name: str, missing: list[int]) -> str:
    """Error for a model whose layers ``missing`` keep no keys."""
    return (
        f"{name}: {_layers(missing)} no keys of their own (they use those of other layers, or "
        "cache none); blocktune caches the keys of every layer: use a decoder that keeps them"
    )


class _Recorder:
    """A plan in which every row attends only to itself, so that attention mixes no tokens."""

    def __init__(self):
        self.queries: dict[int, Tensor] = {}
        self.windows: dict[int, int | None] = {}

    def attend(self, query, key, value, rule: LayerRule, params) -> Tensor:
        self.queries[rule.layer], self.windows[rule.layer] = query, rule.window
        own = value[:, :, -query.shape[2] :]
        return own.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


class Probe:
    """Tests one small model for the four properties."""

    def __init__(
        self, name: str, model: PreTrainedModel, length: int | None, small_length: int | None
    ):
        """Runs and attaches the small ``model``. Lengths: up to which reuse is exact, on both."""
        self.name, self.decoder, self.length = name, decoder_of(model), length
        self.depth = self.decoder.config.num_hidden_layers
        self.plan, self.cache = _Recorder(), DynamicCache()
        reach = getattr(self.decoder.config, "max_position_embeddings", 1 << 30)
        reach = min(length or POSITIONS[-1] + 1, reach)
        self.positions = [p for p in POSITIONS if p < reach]
        if len(self.positions) < 2:
            raise Refused(f"{name}: a context of {reach} tokens holds no chunks; use a longer one")
        shape, seeded = (1, min(ROWS, small_length or ROWS)), torch.Generator().manual_seed(1)
        self.ids = torch.randint(1, VOCABULARY - 1, shape, generator=seeded)
        try:
            attach(model)
        except ValueError as error:
            raise Refused(str(error)) from error
        self.stock = self.decoder(self.ids, use_cache=False)[0]

    def run(self) -> Structure:
        """Tests all properties, those that explain others first. Raises `Refused` if one fails."""
        self._require_only_attention_mixes()
        same, positions = torch.full((1, len(self.positions)), 5), torch.tensor([self.positions])
        hidden = planned_forward(self.decoder, same, positions, self.plan, self.cache)[0]
        self._require_every_layer_attends_and_caches()
        layers = self._require_positions_only_rotate(hidden[0])
        self._require_attention_follows_interface()
        windows = tuple(self.plan.windows[index] for index in range(self.depth))
        return Structure(layers, windows, self.length)

    def _require_only_attention_mixes(self) -> None:
        """Changes one row's token: no other row's output may change, in any module."""
        ids = torch.arange(11, 24)[None]
        changed, row = ids.clone(), 6
        changed[0, row] = 99
        before, after = self._module_outputs(ids), self._module_outputs(changed)
        others = [index for index in range(ids.shape[1]) if index != row]
        for (name, kind, left), (same, _, right) in zip(before, after, strict=False):
            if name == same and left.shape == right.shape and _differ(left[others], right[others]):
                layer = next((int(part) for part in name.split(".") if part.isdigit()), 0)
                if kind == "Linear":  # acts on single tokens, so its parent mixed the input
                    kind = type(self.decoder.get_submodule(name.rpartition(".")[0])).__name__
                raise Mixes(mixes_tokens(self.name, kind, layer))

    def _module_outputs(self, ids: Tensor) -> list[tuple[str, str, Tensor]]:
        """Name, class and output ``(S, ...)`` of each module, in the order they finish."""
        outputs, count = [], ids.shape[1]

        def watch(name: str, module: nn.Module, _: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            is_rows = isinstance(first, Tensor) and first.shape[:2] == (1, count)
            if is_rows and not first.is_complex():
                outputs.append((name, type(module).__name__, first[0].float()))

        with ExitStack() as hooks:
            for name, module in self.decoder.named_modules():
                hook = module.register_forward_hook(functools.partial(watch, name))
                hooks.callback(hook.remove)
            self.decoder(ids, plan=_Recorder(), use_cache=False)
        return outputs

    def _require_every_layer_attends_and_caches(self) -> None:
        every = set(range(self.depth))
        if more := self.plan.queries.keys() - every:
            raise Refused(
                f"{self.name} attends in {self.depth + len(more)} layers where its configuration "
                f"has {self.depth} (layers that run several times); use one whose layers run once"
            )
        if missing := sorted(every - self.plan.queries.keys()):
            raise Refused(
                f"{self.name}: {_layers(missing)} no call of transformers' attention interface, so "
                "blocktune's masks do not apply there; use a decoder in which every layer calls it"
            )
        cached = {i for i, layer in enumerate(self.cache.layers) if layer.is_initialized}
        if missing := sorted(every - cached):
            raise Refused(without_keys(self.name, missing))

    def _require_positions_only_rotate(self, hidden: Tensor) -> tuple[Rotated, ...]:
        if _differ(hidden[1:], hidden[:1].expand_as(hidden[1:])):
            raise NoRotary(NO_ROTARY.format(self.name))
        named = self.decoder.named_buffers()
        buffers = {n: b for n, b in named if n.endswith("inv_freq") and "original" not in n}
        return tuple(self._rotation(index, buffers) for index in range(self.depth))

    def _rotation(self, index: int, buffers: dict[str, Tensor]) -> Rotated:
        """The rotation that turns a layer's cached state at the first position into all others."""
        layer = self.cache.layers[index]
        in_values = _moves(layer.values) and not _moves(layer.keys)
        rotated, fixed = layer.keys, layer.values
        if in_values:
            rotated, fixed = fixed, rotated
        forms = [Rotated("", in_values=in_values)]
        for name, buffer in buffers.items():
            rest = rotated.shape[-1] - 2 * len(buffer)
            # NanoChat rotates the other way: with sign -1.
            kinds = product((1, -1), {0, rest} if rest >= 0 else (), (False, True))
            forms += [Rotated(name, *kind, in_values) for kind in kinds]
        errors = [self._error(rotated, form.rope(buffers)) for form in forms]
        best = min(range(len(forms)), key=errors.__getitem__)
        if errors[best] > TOLERANCE or _moves(fixed):
            raise Refused(
                f"{self.name}: in layer {index}, keys at different positions do not differ by a "
                "rotation by the model's frequencies, so cached keys cannot be moved; use RoPE"
            )
        query = self.plan.queries[index]
        if self._error(query, forms[best].rope(buffers).of_keys(query.shape[-1])) > TOLERANCE:
            raise Refused(
                f"{self.name}: layer {index} does more to its queries by position than rotate "
                "them, so moved chunks would be wrong; use a model that only rotates queries"
            )
        return forms[best]

    def _error(self, states: Tensor, rope: LayerRope) -> float:
        """Largest error of moving the first row's states to all positions, relative to them."""
        shift = torch.tensor([self.positions]) - self.positions[0]
        moved = relocate_keys(states[:, :, :1].expand_as(states), shift, rope)
        return float((moved - states).abs().max() / states.abs().max().clamp(min=1e-9))

    def _require_attention_follows_interface(self) -> None:
        at = torch.arange(self.ids.shape[1])[None]
        kind, chunk, group, sample, supersedes, until = (
            torch.full_like(at, value)
            for value in (Kind.QUERY, NO_CHUNK, GLOBAL, 0, NO_ROW, FOREVER)
        )
        layout = Layout(kind, chunk, at, at, at, group, sample, supersedes, until)
        planned = planned_forward(self.decoder, self.ids, layout.position, DensePlan(layout))
        if _differ(planned[0], self.stock):
            raise Refused(
                f"{self.name} does not attend as its layers tell transformers' attention interface "
                "(it adds its own mask, bias or window), so blocktune's masks would be wrong on "
                "it; use a decoder with plain causal or sliding-window attention"
            )


def _layers(missing: list[int]) -> str:
    single, count = len(missing) == 1, len(missing)
    return f"layer {missing[0]} has" if single else f"{count} layers (first: {missing[0]}) have"


def _moves(states: Tensor) -> bool:
    """Whether states ``(1, K, S, D)`` of the same token differ between positions."""
    return _differ(states[:, :, 1:], states[:, :, :1].expand_as(states[:, :, 1:]))


def _differ(left: Tensor, right: Tensor) -> bool:
    """Whether states differ by more than rounding. NaN differs from everything."""
    scale = max(float(left.abs().max()), 1e-9)
    return not float((left.float() - right.float()).abs().max()) <= TOLERANCE * scale
