"""Chunks thinned by a press of kvpress before they are stored: fewer keys than positions.

A press scores the keys of a chunk, head by head, by what its layer saw while the chunk was encoded,
and drops the lowest. The others keep the positions that they had. What remains of ``S`` tokens is
stored and laid out as the chunk's first ``n`` rows; its last ``S - n`` are rows without a column,
as blanks are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from blocktune.attention.interface import decoder_of
from blocktune.methods import Cached, Method
from blocktune.methods.select.base import Nothing
from blocktune.models.gate import decoder_layers
from blocktune.prompt import LayoutSpec


class Press:
    """A press by its name and ratio, such as ``snapkv:0.5``, which drops half of the keys.

    Attributes:
        text: As it was given.

    Raises:
        ValueError: If kvpress is not installed, has no such press, or the ratio is out of range.
    """

    def __init__(self, text: str):
        name, _, ratio = text.partition(":")
        known = _presses()
        if name not in known or not ratio.replace(".", "", 1).isdigit() or not float(ratio) < 1:
            raise ValueError(
                f"a press is NAME:RATIO with a ratio of keys to drop in [0, 1) and a name of "
                f"{', '.join(sorted(known))}; got '{text}'"
            )
        self.text, self._press = text, known[name](compression_ratio=float(ratio))

    def count(self, num_tokens: int) -> int:
        """Keys that remain of a chunk; one that the press cannot score is kept whole."""
        own = (getattr(self._press, name, 0) for name in ("window_size", "n_sink", "n_local"))
        if num_tokens <= max(own):
            return num_tokens
        return int(num_tokens * (1 - self._press.compression_ratio)) or num_tokens

    def require(self, method: Method, spec: LayoutSpec) -> None:
        """Raises ValueError if a method needs the tokens that were dropped."""
        plain = type(method.select()) is Nothing and method.history is None
        if method.cached is Cached.CHUNKS and not (plain and spec.block and not spec.keeps_bos):
            raise ValueError(
                f"method '{method.name}' needs all keys of a chunk, and press '{self.text}' drops "
                "some; use a method that recomputes nothing, or leave the press out"
            )
        if method.cached is Cached.CHUNKS and (spec.num_learned or spec.sinks):
            raise ValueError(
                f"method '{method.name}' encodes chunks after or between other tokens, which press "
                f"'{self.text}' would score as well; leave the press out"
            )

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[list[dict[str, Any]]]:
        """Inside the block, a forward pass fills what it yields: the inputs of each attention."""
        seen: list[dict[str, Any]] = []
        rotary = getattr(decoder_of(model), "rotary_emb", None)
        for layer in decoder_layers(model):  # where kvpress puts it; no submodule of the model's
            vars(_attention(layer)).setdefault("rotary_emb", rotary)
        hooks = [
            _attention(layer).register_forward_pre_hook(
                lambda module, args, kwargs: seen.append({"module": module, **kwargs}),
                with_kwargs=True,
            )
            for layer in decoder_layers(model)
        ]
        try:
            yield seen
        finally:
            for hook in hooks:
                hook.remove()

    def thin(
        self, seen: dict[str, Any], prompt: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``(K, n, D)`` that remain of a layer's ``(K, S, D)`` of one prompt.

        Raises:
            ValueError: If the press does not drop the same number of keys in every layer.
        """
        size = keys.shape[1]
        wanted = self.count(size)
        if wanted == size:
            return keys, values
        hidden = seen["hidden_states"][prompt, None, :size]
        turns = [part[prompt % len(part), None, :size] for part in seen["position_embeddings"]]
        made = self._press.compress(
            seen["module"],
            hidden,
            keys[None],
            values[None],
            None,
            {"position_embeddings": turns, "hidden_states": hidden},
        )
        if any(part.shape[2] != wanted for part in made):
            raise ValueError(
                f"press '{self.text}' leaves {made[0].shape[2]} keys of {size} in one layer and "
                f"{wanted} in another; use one that drops as many in every layer, such as snapkv"
            )
        return made[0][0], made[1][0]


def _attention(layer: nn.Module) -> nn.Module:
    if not hasattr(layer, "self_attn"):
        raise ValueError(f"presses need layers with '.self_attn', {type(layer).__name__} has none")
    return layer.self_attn


def _presses() -> dict[str, type]:
    """Those that score keys by what a layer sees of a chunk, by their names in small letters."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        import kvpress
    except ImportError:
        raise ValueError(
            "presses need the package kvpress, which pins an older transformers; run "
            "pip install --no-deps kvpress 'cachetools<6' fire termcolor"
        ) from None
    for name, function in before.items():  # it wraps all of them when it is first imported
        ALL_ATTENTION_FUNCTIONS[name] = function
    named = ((name.lower().removesuffix("press"), getattr(kvpress, name)) for name in dir(kvpress))
    base = kvpress.ScorerPress
    return {
        name: cls
        for name, cls in named
        if isinstance(cls, type)
        and issubclass(cls, base)
        and cls.score is not base.score
        and cls.forward_hook is base.forward_hook
        and cls.__call__ is base.__call__
    }
