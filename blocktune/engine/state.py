"""What all batches of an engine share: the model, other models it may ask, and the caches."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.adapter.load import load_model
from blocktune.attention import attach
from blocktune.cache import PrefixTree
from blocktune.engine.decode_cache import DecodeCache
from blocktune.engine.encode import Encoder
from blocktune.methods import Method
from blocktune.models.recurrent import Recurrence
from blocktune.positions import RopeSpec
from blocktune.prompt import end_of_turn

SELF = "self"
"""The name of the served model itself among the auxiliary models."""


class Auxiliaries:
    """Models that selectors may ask which tokens matter, by name; loaded on first use.

    Attributes:
        may_load: Whether names that were never added may be loaded from folders and the Hub.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        """Serves ``model`` as `SELF`; the others must share its ``tokenizer``."""
        self.tokenizer = tokenizer
        self._models = {SELF: model}
        self._device = model.device
        self.may_load = True
        self._lock = threading.Lock()

    def add(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Adds a loaded model; its attention becomes blocktune's.

        Raises:
            ValueError: If it reads the served model's token ids as other text.
        """
        own, theirs = self.tokenizer.get_vocab(), tokenizer.get_vocab()
        if wrong := sorted((i, token) for token, i in own.items() if theirs.get(token) != i):
            index, token = wrong[0]
            raise ValueError(
                f"auxiliary model '{name}' has another tokenizer than the served model: "
                f"{len(wrong):,} of {len(own):,} tokens differ, such as id {index}, {token!r}; "
                "take a model of the same family"
            )
        attach(model)
        self._models[name] = model.eval()

    def get(self, name: str) -> PreTrainedModel:
        """The model of a name; one that was never added is loaded from a folder or the Hub."""
        with self._lock:
            if name not in self._models:
                if not self.may_load:
                    raise ValueError(f"no auxiliary model '{name}' is served; use '{SELF}'")
                loaded = load_model(name, device=str(self._device))
                self.add(name, loaded.model, loaded.tokenizer)
            return self._models[name]


@dataclass(frozen=True)
class EngineState:
    """The model, its tokenizer and its caches.

    ``encoder`` has the store of chunks, ``prefix_tree`` the exact prefixes of earlier prompts;
    ``rope`` says how keys are moved, or ``recurrence`` how a model with recurrent layers, whose
    chunks cannot be, continues from a state; ``pad_id`` is the token of padding rows;
    ``decode_cache`` says how keys are held while decoding, None: as after the prefill.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    prefix_tree: PrefixTree
    rope: RopeSpec | None
    pad_id: int
    auxiliaries: Auxiliaries
    recurrence: Recurrence | None = None
    decode_cache: DecodeCache | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.model.config.get_text_config().num_hidden_layers

    def prefixes(self, method: Method) -> Any:
        """Where exact prefixes of a method's prompts are kept, like a `PrefixTree`."""
        own = method.prefixes(self.encoder.store, self.tokenizer.decode)
        return self.prefix_tree if own is None else own

    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the template's end of turn and the model's own."""
        eos = self.model.generation_config.eos_token_id
        ids = [*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id]
        return frozenset({end_of_turn(self.tokenizer)[-1], *(i for i in ids if i is not None)})

    def text(self, ids: Sequence[int]) -> str:
        """Decoded, without special tokens and surrounding space."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
