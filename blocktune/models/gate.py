"""What a model must be, asked in one place, of a small random model made from its configuration.

Chunk reuse and block training are exact on a decoder if four properties hold: attention is all that
mixes tokens, every layer attends by the function that blocktune hands it and keeps keys of its own,
positions enter by rotating queries and keys alone, and a layer attends to what it tells that
function. `examine` proves them, or names the one that stands in the way. Nothing is decided by a
model's name.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from blocktune.attention import DensePlan, attach
from blocktune.attention.interface import decoder_of
from blocktune.layout import FOREVER, GLOBAL, NO_CHUNK, NO_ROW, Kind, LayerRule, Layout
from blocktune.models.small import VOCABULARY, causal_class, quiet, small_config, small_model
from blocktune.positions import LayerRope, RopeSpec, relocate_keys

ATTENDING = ("full_attention", "sliding_attention", "chunked_attention", "attention")
"""Layer types of a configuration whose layers only attend."""
TOLERANCE = 1e-3
"""Of a state's largest element: float32 rounds by less, a wrong mask or rotation moves more."""
POSITIONS = (3, 4, 11, 64, 901)
ROWS = 40


class Refused(ValueError):
    """A model that chunk reuse would be wrong on; the message names the property in one line."""


class Mixes(Refused):
    """A model that mixes tokens otherwise than by attention: a hybrid, for one."""


class _Rotated(NamedTuple):
    """A `LayerRope` by the frequencies in ``buffer`` of the decoder times ``sign``; "": none."""

    buffer: str
    sign: int = 1
    start: int = 0
    interleaved: bool = False
    in_values: bool = False

    def rope(self, buffers: Mapping[str, Tensor]) -> LayerRope:
        """By the buffers of a decoder."""
        if not self.buffer:
            return LayerRope(torch.empty(0), *self[2:])
        return LayerRope(self.sign * buffers[self.buffer].float(), *self[2:])


class Structure(NamedTuple):
    """What `examine` found.

    Attributes:
        layers: How each layer rotates its keys.
        windows: Sliding window of each layer, in tokens.
        max_tokens: Length up to which reuse is exact, None without such a limit.
    """

    layers: tuple[_Rotated, ...]
    windows: tuple[int | None, ...]
    max_tokens: int | None


def require_supported(model: PreTrainedModel) -> RopeSpec:
    """Refuses a model whose cached chunks could not be moved; returns how to move them.

    The frequencies are those that this model itself rotates with. The model may be a PEFT model,
    quantised or split over processes: nothing runs through it.

    Raises:
        Refused: In one line, the property that stands in the way.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    cls = type(base) if isinstance(config, type(base).config_class) else causal_class(config)
    found = examine(config, cls)
    buffers = dict(decoder_of(base).named_buffers())
    return RopeSpec(tuple(one.rope(buffers) for one in found.layers), found.max_tokens)


def examine(config: PreTrainedConfig, cls: type[PreTrainedModel] | None = None) -> Structure:
    """Asks whether chunk reuse is exact on the models of a configuration, before any is loaded.

    Args:
        config: Of the text model or of a multimodal one around it.
        cls: The model's class; None: the causal language model that transformers has for it.

    Raises:
        Refused: See `require_supported`.
    """
    whole, config = config, config.get_text_config(decoder=True)
    cls = cls or causal_class(config) or causal_class(whole)
    if cls is None:
        raise Refused(
            f"transformers has no causal language model of type '{config.model_type}'; use a "
            "decoder that AutoModelForCausalLM can load"
        )
    if config.is_encoder_decoder:
        raise Refused(
            f"{cls.__name__} is the decoder of an encoder-decoder model, which attends to an "
            "encoder's output; use a decoder-only model"
        )
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    others = [index for index, kind in enumerate(kinds) if kind not in ATTENDING]
    if others:
        raise Mixes(_mixing(cls.__name__, f"'{kinds[others[0]]}'", others[0], len(others)))
    key = json.dumps(config.to_dict(), sort_keys=True, default=str)
    return _examine(cls, _Keyed(config, key))


class _Keyed:
    """A configuration that is equal to any with the same values."""

    def __init__(self, config: PreTrainedConfig, key: str):
        self.config, self.key = config, key

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Keyed) and other.key == self.key

    def __hash__(self) -> int:
        return hash(self.key)


@functools.lru_cache(maxsize=64)
def _examine(cls: type[PreTrainedModel], keyed: _Keyed) -> Structure:
    config, name = keyed.config, cls.__name__
    try:
        small = small_config(config)
        model = small_model(small, cls)
    except Exception as error:
        raise Refused(f"{name}: no small model of its kind can be made: {_line(error)}") from error
    try:
        with quiet(), torch.no_grad():
            return _Probe(name, model, _length(config), _length(small)).run()
    except Refused:
        raise
    except Exception as error:
        raise Refused(
            f"{name} does not run with blocktune's attention ({_line(error)}); use a decoder whose "
            "attention can be switched by set_attn_implementation"
        ) from error


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def _mixing(name: str, what: str, layer: int, count: int = 1) -> str:
    more = f" and {count - 1} more" if count > 1 else ""
    return (
        f"{name}: {what} in layer {layer}{more} mixes tokens otherwise than by attention under a "
        "mask (a recurrence, a convolution, or a choice of tokens of its own), so a chunk's states "
        "depend on the text before it; use a decoder that mixes tokens by plain attention alone"
    )


def _length(config: PreTrainedConfig) -> int | None:
    """Prompt length from which a model does more with positions than a rotation can undo.

    RoPE types that change their frequencies with the length of the prompt, queries scaled by
    absolute position (Ministral 3, Llama 4), attention in chunks of absolute positions (Llama 4)
    and attention to a fixed number of chosen tokens (DeepSeek V3.2).
    """
    lengths = []
    rope = getattr(config, "rope_parameters", None) or {}
    for one in [rope, *(part for part in rope.values() if isinstance(part, dict))]:
        original = one.get("original_max_position_embeddings")
        if one.get("rope_type") == "dynamic":
            lengths.append(config.max_position_embeddings)
        if one.get("rope_type") == "longrope" or one.get("llama_4_scaling_beta"):
            lengths.append(original)
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        lengths.append(config.attention_chunk_size)
    if getattr(config, "attn_temperature_tuning", False):
        lengths.append(config.floor_scale - 1)
    lengths.append(getattr(config, "index_topk", None))
    return min((length for length in lengths if length is not None), default=None)


class _Recorder:
    """A plan by which every row attends to itself, so that attention mixes nothing."""

    def __init__(self):
        self.queries: dict[int, Tensor] = {}
        self.windows: dict[int, int | None] = {}

    def attend(self, query, key, value, rule: LayerRule, params) -> Tensor:
        """Implements `Plan.attend`."""
        self.queries[rule.layer], self.windows[rule.layer] = query, rule.window
        own = value[:, :, -query.shape[2] :]
        return own.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2)


class _Pass(NamedTuple):
    hidden: Tensor  # (1, S, hidden)
    cache: DynamicCache
    plan: _Recorder


class _Probe:
    """The four properties, asked of one small model."""

    def __init__(self, name: str, model: PreTrainedModel, length, small_length):
        self.name, self.decoder, self.length = name, decoder_of(model), length
        self.depth = self.decoder.config.num_hidden_layers
        reach = min(
            length or POSITIONS[-1] + 1,
            getattr(self.decoder.config, "max_position_embeddings", 1 << 30),
        )
        self.positions = [p for p in POSITIONS if p < reach]
        generator = torch.Generator().manual_seed(1)
        shape = (1, min(ROWS, small_length or ROWS))
        self.ids = torch.randint(1, VOCABULARY - 1, shape, generator=generator)
        self.stock = self.decoder(self.ids, use_cache=False)[0]
        try:
            attach(model)
        except ValueError as error:
            raise Refused(str(error)) from error

    def run(self) -> Structure:
        """Asks for all of them, the ones that explain others first."""
        same = torch.full((1, len(self.positions)), 5)
        self._only_attention_mixes()
        made = self._forward(same, torch.tensor([self.positions]))
        self._every_layer_attends_and_keeps(made)
        layers = self._positions_only_rotate(made)
        self._tells_what_it_attends_to()
        windows = tuple(made.plan.windows[index] for index in range(self.depth))
        return Structure(layers, windows, self.length)

    def _forward(self, ids: Tensor, positions: Tensor | None = None) -> _Pass:
        cache, plan = DynamicCache(), _Recorder()
        if positions is None:
            positions = torch.arange(ids.shape[1])[None]
        options = {"plan": plan, "past_key_values": cache, "use_cache": True}
        hidden = self.decoder(ids, position_ids=positions, **options)[0]
        return _Pass(hidden, cache, plan)

    def _only_attention_mixes(self) -> None:
        """One row's token is changed: no other row may move, in any module."""
        ids = torch.arange(11, 24)[None]
        changed, row = ids.clone(), 6
        changed[0, row] = 99
        one, other = self._watched(ids), self._watched(changed)
        others = [index for index in range(ids.shape[1]) if index != row]
        for (name, kind, left), (_, _, right) in zip(one, other, strict=False):
            if left.shape == right.shape and _differ(left[others], right[others]):
                layer = next((int(part) for part in name.split(".") if part.isdigit()), 0)
                raise Mixes(_mixing(self.name, kind, layer))

    def _watched(self, ids: Tensor) -> list[tuple[str, str, Tensor]]:
        """Name, class and output ``(S, ...)`` of each module in the order they finish."""
        outputs, count = [], ids.shape[1]

        def watch(name: str, module: nn.Module, _: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) and output else output
            if (
                isinstance(first, Tensor)
                and first.shape[:2] == (1, count)
                and not first.is_complex()
            ):
                outputs.append((name, type(module).__name__, first[0].float()))

        hooks = [
            module.register_forward_hook(functools.partial(watch, name))
            for name, module in self.decoder.named_modules()
        ]
        try:
            self._forward(ids)
        finally:
            for hook in hooks:
                hook.remove()
        return outputs

    def _every_layer_attends_and_keeps(self, made: _Pass) -> None:
        every = set(range(self.depth))
        if more := made.plan.queries.keys() - every:
            raise Refused(
                f"{self.name} attends in {self.depth + len(more)} layers where its configuration "
                f"has {self.depth} (layers that run several times); use a decoder whose layers run "
                "once"
            )
        if missing := sorted(every - made.plan.queries.keys()):
            raise Refused(
                f"{self.name}: {_layers(missing)} no call of transformers' attention interface, so "
                "no mask of blocktune's reaches them; use a decoder in which every layer does"
            )
        kept = {i for i, layer in enumerate(made.cache.layers) if layer.is_initialized}
        if missing := sorted(every - kept):
            raise Refused(
                f"{self.name}: {_layers(missing)} no keys of their own (they use those of other "
                "layers, or cache none); blocktune caches the keys of every layer: use a decoder "
                "in which every layer keeps them"
            )

    def _positions_only_rotate(self, made: _Pass) -> tuple[_Rotated, ...]:
        hidden = made.hidden[0]
        if _differ(hidden[1:], hidden[:1].expand_as(hidden[1:])):
            raise Refused(
                f"{self.name} has no rotary position embedding, or adds positions to its states as "
                "well; blocktune moves cached chunks by rotating their keys: use a RoPE model"
            )
        buffers = {
            name: buffer
            for name, buffer in self.decoder.named_buffers()
            if name.endswith("inv_freq") and "original" not in name
        }
        return tuple(self._rotation(made, index, buffers) for index in range(self.depth))

    def _rotation(self, made: _Pass, index: int, buffers: dict[str, Tensor]) -> _Rotated:
        """The rotation that gives what a layer caches at all positions from the first."""
        layer = made.cache.layers[index]
        in_values = _moves(layer.values) and not _moves(layer.keys)
        rotated, fixed = layer.keys, layer.values
        if in_values:
            rotated, fixed = fixed, rotated
        forms = [_Rotated("", in_values=in_values)]
        for name, buffer in buffers.items():
            rest = rotated.shape[-1] - 2 * len(buffer)
            starts = {0, rest} if rest >= 0 else ()
            forms += [
                _Rotated(name, sign, start, interleaved, in_values)
                for sign in (1, -1)  # NanoChat rotates the other way
                for start in starts
                for interleaved in (False, True)
            ]
        errors = [self._error(rotated, form.rope(buffers)) for form in forms]
        best = min(range(len(forms)), key=errors.__getitem__)
        if errors[best] > TOLERANCE or _moves(fixed):
            raise Refused(
                f"{self.name}: the keys of layer {index} at another position are not those of a "
                "rotation by the model's frequencies, so cached keys cannot be moved; use a RoPE "
                "model"
            )
        query = made.plan.queries[index]
        if self._error(query, forms[best].rope(buffers).of_keys(query.shape[-1])) > TOLERANCE:
            raise Refused(
                f"{self.name}: layer {index} does more to its queries by position than rotate "
                "them, so chunks that were encoded elsewhere differ; use a model that only rotates"
            )
        return forms[best]

    def _error(self, states: Tensor, rope: LayerRope) -> float:
        """Of moving the first row's states to the positions of all, relative to the largest."""
        shift = torch.tensor([self.positions]) - self.positions[0]
        moved = relocate_keys(states[:, :, :1].expand_as(states), shift, rope)
        return float((moved - states).abs().max() / states.abs().max().clamp(min=1e-9))

    def _tells_what_it_attends_to(self) -> None:
        layout = _full(self.ids.shape[1])
        options = {"position_ids": layout.position, "plan": DensePlan(layout), "use_cache": False}
        if _differ(self.decoder(self.ids, **options)[0], self.stock):
            raise Refused(
                f"{self.name} attends otherwise than its layers tell transformers' attention "
                "interface (a mask, bias or window of its own), so blocktune's masks would be "
                "wrong on it; use a decoder with plain causal or sliding-window attention"
            )


def _full(rows: int) -> Layout:
    """A prompt in full attention."""
    count = torch.arange(rows)[None]

    def all_rows(value: int) -> Tensor:
        return torch.full_like(count, value)

    return Layout(
        kind=all_rows(int(Kind.QUERY)),
        chunk=all_rows(NO_CHUNK),
        offset=count,
        position=count,
        order=count,
        group=all_rows(GLOBAL),
        sample=all_rows(0),
        supersedes=all_rows(NO_ROW),
        until=all_rows(FOREVER),
    )


def _layers(missing: list[int]) -> str:
    one = len(missing) == 1
    return f"layer {missing[0]} has" if one else f"{len(missing)} layers (first: {missing[0]}) have"


def _moves(states: Tensor) -> bool:
    """Whether states ``(1, K, S, D)`` of one token differ by position."""
    return _differ(states[:, :, 1:], states[:, :, :1].expand_as(states[:, :, 1:]))


def _differ(left: Tensor, right: Tensor) -> bool:
    """Whether states differ by more than rounding; NaN differs from everything."""
    scale = max(float(left.abs().max()), 1e-9)
    return not float((left.float() - right.float()).abs().max()) <= TOLERANCE * scale


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The model's decoder layers, through a PEFT wrapper or not.

    Raises:
        ValueError: If no list has as many layers as the config says.
    """
    depth = model.config.get_text_config().num_hidden_layers
    for name, module in model.named_modules():
        if name.endswith("layers") and isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of {depth} decoder layers to hook into; "
        "blocktune serves decoders whose layers are in one list"
    )
