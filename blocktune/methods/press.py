"""Chunks thinned by a press of kvpress before they are stored: fewer keys than positions.

A press scores the keys of a chunk, head by head, by what its layer saw while the chunk was encoded,
and drops the lowest. The others keep the positions that they had. What remains of ``S`` tokens is
stored and laid out as the chunk's first ``n`` rows; its last ``S - n`` are rows without a column,
as blanks are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from blocktune.attention.interface import decoder_of
from blocktune.methods import Cached, Method
from blocktune.methods.select.base import Nothing
from blocktune.models.gate import decoder_layers
from blocktune.prompt import LayoutSpec


class Press:
    """A press by its name and ratio: ``snapkv:0.5`` drops half of the keys.

    Raises ValueError if kvpress is not installed, has no such press, or the ratio is no share.
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
        """Raises ValueError if a method needs tokens that are dropped, or encodes others, too."""
        plain = type(method.select()) is Nothing and method.history is None and spec.block
        others = spec.num_learned or spec.sinks or spec.keeps_bos
        if method.cached is Cached.CHUNKS and (others or not plain):
            raise ValueError(
                f"method '{method.name}' recomputes tokens of chunks or adds some to them, which "
                f"press '{self.text}' drops or would score; use naive, ape or sel, or no press"
            )

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[list[dict[str, Any]]]:
        """Inside the block, a forward pass fills what it yields: the inputs of each attention."""
        seen: list[dict[str, Any]] = []

        def note(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append({"module": module, **kwargs})

        rotary = getattr(decoder_of(model), "rotary_emb", None)
        with ExitStack() as hooks:
            for layer in decoder_layers(model):
                if not hasattr(layer, "self_attn"):
                    raise ValueError(f"presses need '.self_attn', {type(layer).__name__} has none")
                # Where kvpress puts it; it is no submodule of the model's.
                vars(layer.self_attn).setdefault("rotary_emb", rotary)
                hook = layer.self_attn.register_forward_pre_hook(note, with_kwargs=True)
                hooks.callback(hook.remove)
            yield seen

    def thin(
        self, seen: dict[str, Any], prompt: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``(K, n, D)`` that remain of a layer's ``(K, S, D)`` of one prompt.

        Raises ValueError if the press does not drop the same number in every layer.
        """
        size, wanted = keys.shape[1], self.count(keys.shape[1])
        if wanted == size:
            return keys, values
        hidden = seen["hidden_states"][prompt, None, :size]
        turns = [part[prompt % len(part), None, :size] for part in seen["position_embeddings"]]
        about = {"position_embeddings": turns, "hidden_states": hidden}
        states = keys[None], values[None]
        try:
            made = self._press.compress(seen["module"], hidden, *states, None, about)
        except Exception as error:  # it needs statistics, attention weights or another model
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"press '{self.text}' cannot score these chunks: {reason}") from error
        if any(part.shape[2] != wanted for part in made):
            raise ValueError(
                f"press '{self.text}' leaves {made[0].shape[2]} keys of {size} in one layer and "
                f"{wanted} in another; use one that drops as many in every layer, such as snapkv"
            )
        return made[0][0], made[1][0]


def _presses() -> dict[str, type]:
    """Those that score keys by what a layer sees of a chunk, by their names in small letters."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        import kvpress
    except ImportError as error:
        raise ValueError(
            f"presses need the package kvpress ({error}), which pins an older transformers; run "
            "pip install --no-deps kvpress 'cachetools<6' fire termcolor"
        ) from None
    for name, function in before.items():  # it wraps all of them when it is first imported
        ALL_ATTENTION_FUNCTIONS[name] = function
    base = kvpress.ScorerPress
    classes = [cls for cls in vars(kvpress).values() if isinstance(cls, type)]
    return {
        cls.__name__.lower().removesuffix("press"): cls
        for cls in classes
        if issubclass(cls, base)
        and "compression_ratio" in cls.__dataclass_fields__
        and cls.score is not base.score
        and (cls.forward_hook, cls.__call__) == (base.forward_hook, base.__call__)
    }
