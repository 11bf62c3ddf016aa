"""Other models that an engine asks which tokens matter."""

from __future__ import annotations

import threading

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.adapter.load import load_model
from blocktune.attention import attach

SELF = "self"
"""The name of the served model itself."""


class Auxiliaries:
    """Models by name, loaded when first asked for and kept."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        """Serves ``model`` as `SELF`; the others must share its ``tokenizer``."""
        self.tokenizer = tokenizer
        self._models = {SELF: model}
        self._device = model.device
        self._lock = threading.Lock()

    def add(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Enters a loaded model, and switches its attention to blocktune's.

        Raises:
            ValueError: If its tokenizer is not the served model's.
        """
        require_same_tokenizer(name, self.tokenizer, tokenizer)
        attach(model)
        self._models[name] = model.eval()

    def get(self, name: str) -> PreTrainedModel:
        """The model of a name; one that was never added is loaded from the folder or repository.

        Raises:
            ValueError: If there is none, or its tokenizer is not the served model's.
        """
        with self._lock:
            if name not in self._models:
                loaded = load_model(name, device=str(self._device))
                self.add(name, loaded.model, loaded.tokenizer)
            return self._models[name]


def require_same_tokenizer(
    name: str, served: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase
) -> None:
    """Requires that an auxiliary model reads the served model's token ids as the same text.

    Raises:
        ValueError: Naming a token that differs.
    """
    own, theirs = served.get_vocab(), other.get_vocab()
    wrong = sorted((i, token) for token, i in own.items() if theirs.get(token) != i)
    if wrong:
        index, token = wrong[0]
        raise ValueError(
            f"auxiliary model '{name}' has another tokenizer than the served model: {len(wrong):,} "
            f"of {len(own):,} tokens differ, such as id {index}, {token!r}; take a model of the "
            "same family"
        )
