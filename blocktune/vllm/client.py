"""Turns questions with chunks into requests for vLLM.

It needs neither vLLM nor a model: prompts are made by `blocktune.prompt`, and the store's manifest
says which chunks are the model's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from transformers import GenerationConfig

from blocktune.adapter import AdapterInfo
from blocktune.adapter.info import INFO_FILE, OWN_WEIGHTS
from blocktune.adapter.load import PEFT_FILE
from blocktune.cache.store.shelf import StoreView
from blocktune.engine.assemble import is_held
from blocktune.engine.encode import wanted_pieces
from blocktune.engine.prompts import PromptMaker, Request
from blocktune.layout import Kind
from blocktune.methods import Method, Weights, build, default_method
from blocktune.models.gate import context_length, exact_length
from blocktune.models.identity import (
    adapter_fingerprint,
    same_base,
    saved_fingerprint,
    tokenizer_hash,
)
from blocktune.models.load import adapter_folder, pinned, read_config, read_tokenizer, require_stops
from blocktune.parsing import load_json
from blocktune.prompt import LayoutSpec, Pieces, PromptFormat, end_of_turn
from blocktune.prompt.special_tokens import padding_id
from blocktune.vllm.plan import LoadPlan, Segment, require_served

LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""Values of ``max_lora_rank`` that vLLM accepts."""


class Rendered(NamedTuple):
    """What to send to vLLM for one prompt."""

    # all tokens; learned tokens, which vLLM does not know, are replaced by padding
    prompt_ids: list[int]
    plan: LoadPlan | None  # what is loaded instead of computed; None for a prompt without chunks

    @property
    def transfer_params(self) -> dict[str, Any] | None:
        """The value of ``kv_transfer_params``."""
        return None if self.plan is None else self.plan.params(self.prompt_ids)


def open_clients(
    model: str, adapters: Mapping[str, str], store: str | Path, fingerprint: str | None = None
) -> tuple[ChunkClient, dict[str, ChunkClient]]:
    """Clients of the base and, by name, of each adapter.

    A ``fingerprint``, or its first digits, chooses the chunks of those that it fits. Raises
    ValueError if it fits none, or as `ChunkClient` does.
    """
    base = ChunkClient(model, store=store)
    clients = {name: ChunkClient(model, path, store=store) for name, path in adapters.items()}
    chosen = [one for one in (base, *clients.values()) if fingerprint and one._fitting(fingerprint)]
    for one in chosen:
        one._start = fingerprint
    if fingerprint and not chosen:
        raise ValueError(
            f"the store '{base.store.place}' has no chunks of fingerprint '{fingerprint}' that fit "
            f"'{model}' or its adapters; see `blocktune store stat`"
        )
    return base, clients


class ChunkClient:
    """Makes requests for one model, or for one adapter on it.

    Args:
        model: Folder or repository, may end in ``@REVISION``; None: the adapter's base.
        adapter: Folder or repository of a blocktune adapter, or None.
        store: The chunks' folder or URL, as ``--store``.
        format: Wording of prompts; default: the adapter's, else `PromptFormat`'s.
        fingerprint: Which model's chunks to use, if the store has several that fit; its first
            digits are enough.

    Attributes:
        source: The model and its revision (or None), as vLLM is given them.
        lora: Folder of the LoRA adapter that vLLM loads; None: the base answers (chunks may still
            have been encoded with learned tokens).
        method: The default method.
        stop_ids: Tokens that end an answer.

    Raises ValueError if model or adapter cannot be found, or vLLM cannot serve them.
    """

    def __init__(
        self,
        model: str | None = None,
        adapter: str | Path | None = None,
        *,
        store: str | Path,
        format: PromptFormat | None = None,
        fingerprint: str | None = None,
    ):
        if model is not None and adapter is None and (Path(model) / INFO_FILE).is_file():
            model, adapter = None, model
        self.adapter = None if adapter is None else adapter_folder(adapter)
        info = None if self.adapter is None else AdapterInfo.load(self.adapter)
        if model is None and info is None:
            raise ValueError("no model is named; give a model, or an adapter")
        if model is None and info.base_model == OWN_WEIGHTS:
            model = str(self.adapter)
        elif model is None:
            commit = None if Path(info.base_model).exists() else info.base_revision
            model = f"{info.base_model}@{commit}" if commit else info.base_model
        self.model, self.source = model, pinned(model)
        bare, revision = self.source
        self.name = info.base_model if info else bare
        self._config = read_config(bare, revision)
        self._commit = getattr(self._config, "_commit_hash", None) if revision else None
        text = self._config.get_text_config()
        self.tokenizer = read_tokenizer(bare, revision)
        if info is not None:
            self.tokenizer = info.tokenizer(self.adapter, self.tokenizer)
        self._tokenizer_hash = tokenizer_hash(self.tokenizer)
        if info is not None and self._tokenizer_hash != info.tokenizer_hash:
            raise ValueError(
                f"adapter '{adapter}' was trained with another tokenizer than {model}'s"
            )
        if exact_length(text) is not None:
            raise ValueError(
                f"vLLM cannot serve chunks of '{model}': it does more with positions than a "
                "rotation can undo in long prompts; use `blocktune serve`"
            )
        self._scope = info.scope if info else None
        answers = info is not None and info.scope != "encode"  # a writer only encodes
        self.lora = self.adapter if answers and _is_lora(self.adapter) else None
        own = info.format if info else PromptFormat()
        self.format, self._formats = format or own, (format or own, own)
        self.prompts = PromptMaker(
            self.tokenizer,
            self.format,
            trained=info.layout if info else None,
            link_base=_link_base(info, self.tokenizer, text.vocab_size),
            max_tokens=context_length(text),
            num_layers=text.num_hidden_layers,
            num_tokens=text.vocab_size,
        )
        self.method = default_method(self.prompts.trained)
        require_served(self.method, self.prompts.spec(self.method))
        self.store = StoreView(store)
        self._start = fingerprint or ""
        self.stop_ids = _stop_ids(self.tokenizer, bare, revision, text)

    def _fitting(self, start: str) -> list[dict[str, Any]]:
        """Manifests of models whose chunks fit; with a ``start``, whatever the base's name.

        `Engine.reworded`, as ``--instruction``, stores chunks under the wording it starts from.
        """
        wanted = [None if self.adapter is None else adapter_fingerprint(self.adapter), self._scope]
        fitting = [
            manifest
            for manifest in self.store.manifests()
            if manifest["fingerprint"].startswith(start)
            and (start or self._is_of(**manifest["base"]))
            and [(manifest["adapter"] or {}).get(k) for k in ("fingerprint", "scope")] == wanted
            and manifest["tokenizer"]["hash"] == self._tokenizer_hash
        ]
        words = map(dataclasses.asdict, self._formats)
        worded = ([m for m in fitting if m["prompt_format"] == one] for one in words)
        return next(filter(None, worded), [])

    def _is_of(self, name: str, fingerprint: str, revision: str | None = None, **_: Any) -> bool:
        """Whether chunks may be of this base: by its name or folder, revision, saved weights."""
        own, other = Path(self.name), Path(name)
        same = own.samefile(other) if own.exists() and other.exists() else own.name == other.name
        if not same or self._commit not in (None, revision):
            return False
        return self._saved is None or same_base(self._saved, fingerprint)

    @cached_property
    def _saved(self) -> str | None:
        """The fingerprint of the weights in the base's folder, or None if it is unknown."""
        return saved_fingerprint(self.source[0], self._config)

    @cached_property
    def fingerprint(self) -> str:
        """The fingerprint of the chunks' model; ValueError if the store has none or several."""
        fitting = self._fitting(self._start)
        what = f"'{self.name}'" + ("" if self.adapter is None else f" with '{self.adapter}'")
        if not fitting:
            named = f", fingerprint {self._start[:12]}," if self._start else ""
            model = self.model + ("" if self.adapter is None else f" --adapter {self.adapter}")
            raise ValueError(
                f"the store '{self.store.place}' has no chunks of {what}{named} with its present "
                f"weights, in this wording; run `blocktune encode --model {model} "
                f"--store {self.store.place}` first"
            )
        if len(fitting) > 1:
            named = ", ".join(f"{m['fingerprint'][:12]} ({m['dtype']})" for m in fitting)
            raise ValueError(
                f"the store '{self.store.place}' has chunks of several models that fit {what}: "
                f"{named}; name one by its fingerprint (`blocktune store manifest`)"
            )
        return fitting[0]["fingerprint"]

    def read(
        self,
        example: Request | Mapping[str, Any],
        method: str | Method | None = None,
        max_new_tokens: int = 0,
    ) -> Rendered:
        """Renders the request for a question with its chunks.

        Raises ValueError if vLLM cannot serve the method, or the prompt does not fit the model.
        """
        method = self.built(method)
        return self.render(self.prompts.pieces(example, method), method, max_new_tokens)

    def built(self, method: str | Method | None) -> Method:
        """A method by name or instance; None: the default. ValueError if vLLM cannot serve it."""
        method = build(method) if isinstance(method, str) else method or self.method
        links = method.weights is Weights.LINKS  # refused even with an adapter that has them
        require_served(method, LayoutSpec(num_links=1) if links else self.prompts.spec(method))
        return method

    def render(self, pieces: Pieces, method: Method, max_new_tokens: int = 0) -> Rendered:
        """Renders the request for a prompt in pieces; the caller has checked the method."""
        if not pieces.chunks:
            return Rendered([*pieces.prefix, *pieces.query], None)
        prompt = self.prompts.prompt(pieces, self.prompts.spec(method), max_new_tokens)
        layout, pad_id = prompt.layout, padding_id(self.tokenizer, self.prompts.num_tokens)
        rows = (layout.kind[0] != Kind.BLANK).nonzero()[:, 0].tolist()
        known = min(len(self.tokenizer), self.prompts.link_base or len(self.tokenizer))
        prompt_ids = [i if i < known else pad_id for i in (prompt.ids[row] for row in rows)]
        stored = (layout.kind == Kind.PREFIX) | is_held(layout)
        positions = layout.position[stored].tolist()
        segments, start = [], 0
        for piece in wanted_pieces(prompt):
            scoped = piece.is_prefix and self._scope in ("encode", "read")
            segments.append(Segment(piece.ids, positions[start], piece.blanks, scoped))
            start += len(piece.ids)
        return Rendered(prompt_ids, LoadPlan(self.fingerprint, tuple(segments)))

    def missing(self, plan: LoadPlan | None) -> list[Segment]:
        """Segments of a plan that are not in the store."""
        return [] if plan is None else plan.missing(self.store.has)

    def ask_for(self, missing: Sequence[Segment]) -> None:
        """Queues segments for `blocktune encode --follow`."""
        self.store.queue.add(self.fingerprint, [segment.wanted for segment in missing])


def _is_lora(adapter: Path | None) -> bool:
    """Whether vLLM must load the adapter; ValueError if it cannot load all of it."""
    if adapter is None or not (adapter / PEFT_FILE).is_file():
        return False
    config = load_json(adapter / PEFT_FILE)
    extra = [key for key in ("modules_to_save", "trainable_token_indices") if config.get(key)]
    if extra:
        raise ValueError(
            f"vLLM cannot load adapter '{adapter}': it has {extra[0]}; run `blocktune merge` and "
            "serve the merged model"
        )
    return True


def _link_base(info: AdapterInfo | None, tokenizer, vocab_size: int) -> int | None:
    if info is None or not info.num_learned:
        return None
    if info.has_table:
        return vocab_size
    if info.adds_tokens:
        tokenizer.add_tokens([f"<|link_{slot}|>" for slot in range(info.num_learned)], True)
    return tokenizer.convert_tokens_to_ids(info.link_token)


def _stop_ids(tokenizer, model: str, revision: str | None, config) -> list[int]:
    try:
        own = GenerationConfig.from_pretrained(model, revision=revision).eos_token_id
    except OSError:  # it has none
        own = config.eos_token_id
    require_stops(model, own)
    ids = {end_of_turn(tokenizer)[-1], tokenizer.eos_token_id}
    return sorted(ids.union(own if isinstance(own, list) else [own]) - {None})


def lora_rank(folder: Path) -> int:
    """The smallest ``max_lora_rank`` that vLLM accepts and that fits an adapter."""
    config = load_json(folder / PEFT_FILE)
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    if size := next((size for size in LORA_RANKS if size >= rank), None):
        return size
    raise ValueError(
        f"'{folder}' has LoRA of rank {rank}, and vLLM loads at most {LORA_RANKS[-1]}; serve what "
        "`blocktune merge` makes of it"
    )


def transfer_config(store: str | Path, **more: Any) -> dict[str, Any]:
    """The value of vLLM's ``--kv-transfer-config`` for a store, as plain JSON."""
    return {
        "kv_connector": "BlocktuneConnector",
        "kv_connector_module_path": "blocktune.vllm.connector",
        "kv_role": "kv_both",
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": {"store": str(store), **more},
    }
