"""What all batches of an engine share: the model and its caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from blocktune.cache import PrefixTree
from blocktune.engine.auxiliary import Auxiliaries
from blocktune.engine.encode import Encoder
from blocktune.positions import RopeSpec
from blocktune.prompt import end_of_turn


@dataclass(frozen=True)
class EngineState:
    """The model, its tokenizer and its caches."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    prefix_tree: PrefixTree
    rope: RopeSpec
    pad_id: int
    auxiliaries: Auxiliaries

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.model.config.get_text_config().num_hidden_layers

    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the template's end of turn and the model's own."""
        eos = self.model.generation_config.eos_token_id
        ids = [*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id]
        return frozenset({end_of_turn(self.tokenizer)[-1], *(i for i in ids if i is not None)})

    def text(self, ids: Sequence[int]) -> str:
        """Decoded, without special tokens and the space around it."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()
