"""Drops some keys of each chunk before it is stored, by a press of kvpress.

While a chunk is encoded, a press scores its keys from the inputs of each layer, head by head, and
drops the lowest. The ``n`` keys that remain keep their positions, and are stored and laid out as
the chunk's first ``n`` rows; the other rows are without a column, like blanks.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from blocktune.attention.interface import decoder_of
from blocktune.methods import Cached, Method, Nothing
from blocktune.models.gate import decoder_layers
from blocktune.parsing import first_line
from blocktune.prompt import LayoutSpec


class Press:
    """A press by its name and ratio: ``snapkv:0.5`` drops half of the keys.

    Raises ValueError if kvpress is not installed or has no such press, or a ratio not in [0, 1).
    """

    def __init__(self, text: str):
        name, _, ratio = text.partition(":")
        presses = _presses()
        if name not in presses or not ratio.replace(".", "", 1).isdigit() or not float(ratio) < 1:
            raise ValueError(
                f"a press is NAME:RATIO with a ratio of keys to drop in [0, 1) and a name of "
                f"{', '.join(sorted(presses))}; got '{text}'"
            )
        self.text, self._press = text, presses[name](compression_ratio=float(ratio))

    def count(self, num_tokens: int) -> int:
        """Number of keys that remain of a chunk; one too short to score is kept whole."""
        unscored = (getattr(self._press, name, 0) for name in ("window_size", "n_sink", "n_local"))
        if num_tokens <= max(unscored):
            return num_tokens
        return int(num_tokens * (1 - self._press.compression_ratio)) or num_tokens

    def require(self, method: Method, spec: LayoutSpec) -> None:
        """Raises ValueError if a method recomputes chunks, or encodes them with other tokens."""
        plain = type(method.select()) is Nothing and method.history is None and spec.block
        others = spec.num_learned or spec.sinks or spec.keeps_bos
        if method.cached is Cached.CHUNKS and (others or not plain):
            raise ValueError(
                f"method '{method.name}' recomputes tokens of chunks or encodes them with others, "
                f"unlike press '{self.text}'; use naive, or no press"
            )

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[list[dict[str, Any]]]:
        """Yields a list that a forward pass inside the block fills with each attention's inputs."""
        inputs: list[dict[str, Any]] = []
        own = threading.get_ident()

        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if threading.get_ident() != own:  # other threads run the same modules
                return
            for name in ("hidden_states", "position_embeddings"):
                if name not in kwargs:
                    raise ValueError(f"presses need '{name}', {type(module).__name__} gets none")
            inputs.append({"module": module, **kwargs})

        rotary = getattr(decoder_of(model), "rotary_emb", None)
        with ExitStack() as hooks:
            for layer in decoder_layers(model):
                if not hasattr(layer, "self_attn"):
                    raise ValueError(f"presses need '.self_attn', {type(layer).__name__} has none")
                # kvpress reads it there; set this way it is not a submodule.
                vars(layer.self_attn).setdefault("rotary_emb", rotary)
                hook = layer.self_attn.register_forward_pre_hook(record, with_kwargs=True)
                hooks.callback(hook.remove)
            yield inputs

    def thin(
        self, inputs: dict[str, Any], prompt: int, keys: Tensor, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Keys and values ``(K, n, D)`` that remain of one layer's ``(K, S, D)`` of one prompt.

        Raises ValueError if the press cannot score them, or drops other numbers in other layers.
        """
        size, remaining = keys.shape[1], self.count(keys.shape[1])
        if remaining == size:
            return keys, values
        hidden = inputs["hidden_states"][prompt, None, :size]
        angles = [part[prompt % len(part), None, :size] for part in inputs["position_embeddings"]]
        kwargs = {"position_embeddings": angles, "hidden_states": hidden}
        states = keys[None], values[None]
        try:
            pressed = self._press.compress(inputs["module"], hidden, *states, None, kwargs)
        except Exception as error:  # it needs statistics, attention weights or another model
            reason = first_line(error)
            raise ValueError(f"press '{self.text}' cannot score these chunks: {reason}") from error
        if not _keys_as_kvpress(inputs["module"], hidden, *angles, keys):
            chosen, choose = [], self._press.compress
            for seen in (hidden, hidden * 0):
                with torch.random.fork_rng():
                    torch.manual_seed(0)  # for presses that draw
                    chosen.append(choose(inputs["module"], seen, *states, None, kwargs))
            if not all(map(torch.equal, *chosen)):
                raise ValueError(
                    f"press '{self.text}' scores by queries, which kvpress does not compute as "
                    f"{type(inputs['module']).__name__} does; use one that scores by keys, as knorm"
                )
        if any(part.shape[2] != remaining for part in pressed):
            raise ValueError(
                f"press '{self.text}' leaves {pressed[0].shape[2]} keys of {size} in one layer and "
                f"{remaining} in another; use one that drops as many in every layer, such as snapkv"
            )
        return pressed[0][0], pressed[1][0]


def _keys_as_kvpress(
    module: nn.Module, hidden: Tensor, cos: Tensor, sin: Tensor, keys: Tensor
) -> bool:
    """Whether kvpress computes a layer's keys as the layer does, and so its queries as well."""
    from kvpress.utils import get_prerope_key_states
    from transformers.models.llama.modeling_llama import rotate_half

    try:
        own = get_prerope_key_states(module, hidden)
        own = own * cos[:, None] + rotate_half(own) * sin[:, None]
        return torch.allclose(own, keys[None], rtol=0, atol=0.02 * float(keys.abs().max()))
    except (NotImplementedError, RuntimeError):  # another projection, or a part is rotated
        return False


def _presses() -> dict[str, type]:
    """Presses that score keys by their layer's inputs, by lower-case name."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    before = dict(ALL_ATTENTION_FUNCTIONS.items())
    try:
        import kvpress
    except ImportError as error:
        raise ValueError(
            f"presses need the package kvpress ({error}), which pins an older transformers; run "
            "pip install --no-deps kvpress 'cachetools<6' fire termcolor"
        ) from None
    for name, function in before.items():  # its first import wraps all of them
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
