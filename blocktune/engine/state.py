"""State shared by all batches of an engine, and by the steps of serving one batch."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from blocktune.adapter.load import load_model
from blocktune.attention import attach
from blocktune.cache import PrefixTree, RowCache
from blocktune.cache.decode_cache import DecodeCache
from blocktune.engine.encode import Encoder, Piece, wanted_pieces
from blocktune.engine.rows import column_rows
from blocktune.engine.usage import Stopwatch
from blocktune.layout import Rows
from blocktune.methods import Cached, Method
from blocktune.methods.reshaped_attention import ReshapedAttention
from blocktune.models.recurrent import Recurrence
from blocktune.positions import RopeSpec
from blocktune.prompt import Batch, Pieces, Prompt, end_of_turn, stack

SELF = "self"  # name of the served model among the auxiliary models


class Auxiliaries:
    """Models by name that selectors may use to score tokens. They are loaded on first use."""

    may_load = True  # names that were never added, from folders and the Hub

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        """Registers ``model`` as `SELF`. The others must share its ``tokenizer``."""
        self.tokenizer = tokenizer
        self._models, self._lock = {SELF: model}, threading.Lock()

    def add(self, name: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Attaches and adds a model. Raises ValueError if its tokenizer reads ids as other text."""
        own, theirs = self.tokenizer.get_vocab(), tokenizer.get_vocab()
        if wrong := sorted((i, token) for token, i in own.items() if theirs.get(token) != i):
            index, token = wrong[0]
            raise ValueError(
                f"auxiliary model '{name}' has another tokenizer than the served: {len(wrong):,} "
                f"of {len(own):,} differ, such as id {index}, {token!r}; take one of the family"
            )
        attach(model)
        self._models[name] = model.eval()

    def get(self, name: str) -> PreTrainedModel:
        """The model with a name. If it was never added, it is loaded from a folder or the Hub."""
        with self._lock:
            if name not in self._models:
                if not self.may_load:
                    raise ValueError(f"no auxiliary model '{name}' is served; use '{SELF}'")
                loaded = load_model(name, device=str(self._models[SELF].device))
                self.add(name, loaded.model, loaded.tokenizer)
            return self._models[name]


NEUTRAL = {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "min_length": 0, "num_beams": 1}
NEUTRAL |= {"encoder_repetition_penalty": 1.0, "guidance_scale": 1.0, "use_cache": True}
NEUTRAL |= dict.fromkeys(("min_new_tokens", "stop_strings", "bad_words_ids", "sequence_bias"))
NEUTRAL |= dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "forced_eos_token_id"))
NEUTRAL |= dict.fromkeys(("exponential_decay_length_penalty", "prompt_lookup_num_tokens"))
NEUTRAL |= dict.fromkeys(("cache_implementation", "penalty_alpha", "dola_layers", "max_time"))
"""Settings of a generation config that change greedy decoding, with the value that changes none."""


def unfollowed(config: GenerationConfig) -> dict[str, Any]:
    """The settings of a model's generation config that engines do not follow, made neutral."""
    given = {name: getattr(config, name, None) for name in NEUTRAL}
    return {
        name: NEUTRAL[name] for name, value in given.items() if value not in (None, NEUTRAL[name])
    }


@dataclass(frozen=True)
class EngineState:
    """The model, its tokenizer and its caches."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder  # has the chunk store
    prefix_tree: PrefixTree  # exact prefixes of earlier prompts
    auxiliaries: Auxiliaries
    recurrence: Recurrence | None = None  # how a model whose chunks cannot be moved resumes
    decode_cache: DecodeCache | None = None  # kind of cache for decoding; None: the prefill's

    @property
    def rope(self) -> RopeSpec | None:
        """How keys are moved; None: they cannot be."""
        return self.encoder.rope

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return self.model.config.get_text_config().num_hidden_layers

    def inputs_of(self, method: Method) -> tuple[int, ...]:
        """Layers whose input hidden states a method reads from the chunk store."""
        return method.select_for(self.num_layers).widens(self.num_layers)

    def prefixes(self, method: Method) -> Any:
        """The cache of exact prefixes for a method: a `PrefixTree` or one with its interface."""
        method_cache = method.prefixes(self.encoder.store, self.tokenizer.decode)
        if method_cache is not None and self.recurrence is not None and self.recurrence.has_states:
            raise ValueError(f"method '{method.name}' keeps no recurrent states; use prefix-cache")
        return self.prefix_tree if method_cache is None else method_cache

    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the template's end of turn and the model's own."""
        eos = self.model.generation_config.eos_token_id
        ids = [*(eos if isinstance(eos, list) else [eos]), self.tokenizer.eos_token_id]
        return frozenset({end_of_turn(self.tokenizer)[-1], *(i for i in ids if i is not None)})


@dataclass
class ServedBatch:
    """A batch of prompts while it is served, from layout to answers."""

    state: EngineState
    method: Method
    pieces: Sequence[Pieces]  # token pieces of each prompt
    watch: Stopwatch
    batch: Batch  # the prompts, laid out for ``method`` and stacked, on the model's device
    columns: Rows  # rows of the columns of ``cache``, ``(B, N)``
    cache: RowCache
    reshaping: ReshapedAttention | None  # changes attention to reused keys, or None
    wanted: list[list[Piece]]  # for each prompt, the pieces to load from chunk caches

    @classmethod
    def stacked(
        cls, state: EngineState, prompts: Sequence[Prompt], pieces: Sequence[Pieces], method: Method
    ) -> Self:
        """Stacks prompts, laid out for the method, and makes an empty cache for them."""
        state.encoder.require_model(caches=method.cached is not Cached.NOTHING)
        watch = Stopwatch(state.model.device)
        watch.start()
        batch = stack(prompts, state.encoder.pad_id).to(state.model.device)
        columns, reshape = column_rows(batch.layout), method.reshape()
        reshaping = None if reshape is None else ReshapedAttention(reshape, columns)
        # The states of a full prefill may be kept as exact prefixes.
        exact = method.cached is not Cached.CHUNKS and reshape is None
        cache = RowCache(state.num_layers, *columns.kind.shape, spare=64, exact=exact)
        watch.stop("prompt_s")
        wanted = [wanted_pieces(prompt) for prompt in prompts]
        return cls(state, method, pieces, watch, batch, columns, cache, reshaping, wanted)
