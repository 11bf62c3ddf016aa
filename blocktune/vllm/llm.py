"""vLLM in this process, over a store of chunks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocktune.cache import ChunkStore
from blocktune.engine import Engine
from blocktune.engine.encode import Piece
from blocktune.engine.prompts import Request
from blocktune.engine.usage import Stopwatch
from blocktune.methods import Method
from blocktune.models.identity import adapter_fingerprint
from blocktune.prompt import PromptFormat
from blocktune.vllm.client import ChunkClient, Rendered, lora_rank, transfer_config
from blocktune.vllm.plan import LoadPlan, Segment

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.lora.request import LoRARequest


class LoadFailed(ValueError):
    """Chunks were missing or damaged when vLLM loaded them; nothing was answered."""


@dataclass(frozen=True)
class Completion:
    """An answer of vLLM."""

    text: str  # without the end of turn, and cut at a stop string
    token_ids: tuple[int, ...]  # as generated
    prompt_tokens: int  # tokens of the whole prompt
    cached_tokens: int  # how many of them were loaded, or in vLLM's own cache
    output: RequestOutput  # what vLLM returned


class ChunkLLM:
    """vLLM in this process, over a store of chunks.

    ```python
    llm = ChunkLLM("data/tiny", store="chunks/")
    answer = llm.answer([{"question": "Where is Anna?", "chunks": ["Anna is in Kirby."]}])[0]
    print(answer.text, answer.cached_tokens, "of", answer.prompt_tokens)
    ```

    Chunks that the store lacks are encoded first, by an `Engine` that is loaded when needed.

    Args:
        model: See `ChunkClient`.
        adapter: See `ChunkClient`.
        store: The chunks' folder or URL, as ``--store``.
        dtype: The dtype of vLLM and of the engine that encodes.
        encode_device: Device on which missing chunks are encoded.
        format: Wording of prompts.
        fingerprint: See `ChunkClient`.
        host_gb: Memory for recently used chunks, in GiB.
        options: Options of `vllm.LLM`.

    Raises ValueError as `ChunkClient`.
    """

    def __init__(
        self,
        model: str | None = None,
        adapter: str | Path | None = None,
        *,
        store: str | Path,
        dtype: str = "auto",
        encode_device: str = "cpu",
        format: PromptFormat | None = None,
        fingerprint: str | None = None,
        host_gb: float = 1.0,
        **options: Any,
    ):
        self.client = ChunkClient(
            model, adapter, store=store, format=format, fingerprint=fingerprint
        )
        self._store, self._dtype, self._device = store, dtype, encode_device
        from vllm import LLM
        from vllm.config import KVTransferConfig

        from blocktune.vllm import guard

        guard.install()  # vLLM's engine may be in another process
        if self.client.lora is not None:
            rank = lora_rank(self.client.lora)
            options = {"enable_lora": True, "max_lora_rank": rank} | options
        self.llm = LLM(
            self.client.source[0],
            dtype=dtype,
            kv_transfer_config=KVTransferConfig(**transfer_config(store, host_gb=host_gb)),
            **{"revision": self.client.source[1]} | options,
        )

    def adapted(self, adapter: str | Path | None) -> ChunkLLM:
        """The same vLLM with another adapter: its LoRA (if it has one), wording and chunks.

        The first adapter sets vLLM's options; without one, give ``enable_lora``, ``max_lora_rank``.
        """
        other = copy.copy(self)
        for cached in ("_encoder", "_lora"):
            other.__dict__.pop(cached, None)
        other.client = ChunkClient(self.client.model, adapter, store=self._store)
        return other

    @cached_property
    def _lora(self) -> LoRARequest | None:
        from vllm.lora.request import LoRARequest

        folder = self.client.lora
        if folder is None:
            return None
        name = adapter_fingerprint(folder)
        return LoRARequest(name, 1 + int(name[:7], 16), str(folder))

    @cached_property
    def _encoder(self) -> Engine:
        client = self.client
        store = ChunkStore(config=client.store.config, must_write=True)
        engine = Engine.from_pretrained(
            client.model, client.adapter, store=store, dtype=self._dtype, device=self._device
        )
        return engine if engine.format == client.format else engine.reworded(client.format)

    def encode(self, segments: Sequence[Segment]) -> None:
        """Encodes segments into the store. Raises ValueError if it does not get or keep them."""
        engine, client = self._encoder, self.client
        known, place, wanted = client.fingerprint, client.store.place, [s.wanted for s in segments]
        if engine.fingerprint != known:
            raise ValueError(
                f"'{place}' lacks {len(segments)} segments of model {known[:12]}, and this model "
                f"is {engine.fingerprint[:12]}: its dtype ({engine.model.dtype}) or weights differ"
            )
        pieces = [Piece(*fields) for fields in wanted]
        engine.state.encoder.find(pieces, Stopwatch(engine.model.device))
        client.store.queue.done(known, wanted)
        if lost := client.missing(LoadPlan(known, tuple(segments))):
            raise ValueError(
                f"'{place}' did not keep {len(lost)} of {len(segments)} segments; raise its limits"
            )

    def answer(
        self,
        examples: Sequence[Request | Mapping[str, Any]],
        method: str | Method | None = None,
        *,
        max_new_tokens: int = 32,
        sampling: SamplingParams | None = None,
    ) -> list[Completion]:
        """Answers questions from their cached chunks, all in one batch.

        Args:
            examples: See `Engine.answer`.
            method: A method that `require_served` accepts; None: what the adapter was trained for.
            max_new_tokens: Most tokens to decode, if ``sampling`` is None.
            sampling: vLLM's parameters; default: greedy, to the end of the turn.

        Raises ValueError if a method or a prompt cannot be served, or chunks could not be loaded.
        """
        from vllm import SamplingParams

        try:
            _ = self.client.fingerprint
        except ValueError:
            self.client.fingerprint = self._encoder.fingerprint
        sampling = sampling or SamplingParams(temperature=0.0, max_tokens=max_new_tokens)
        how = self.client.built(method), sampling.max_tokens or 1
        rendered = [self.client.read(example, *how) for example in examples]
        plans = [one.plan for one in rendered if one.plan is not None]
        if missing := {segment for plan in plans for segment in self.client.missing(plan)}:
            self.encode(sorted(missing))
        try:
            return self.generate(rendered, sampling)
        except LoadFailed:  # encoding again replaces chunks that fail verification
            self.encode(sorted({segment for plan in plans for segment in plan.segments}))
            return self.generate(rendered, sampling)

    def generate(self, rendered: Sequence[Rendered], sampling: SamplingParams) -> list[Completion]:
        """Answers prompts whose chunks are stored; prompts with and without chunks may be mixed.

        Raises `LoadFailed` if the chunks of a prompt could not be loaded.
        """
        from vllm import TokensPrompt

        params = []
        for request in rendered:
            own = sampling.clone()
            if not own.ignore_eos:
                own.stop_token_ids = sorted({*(own.stop_token_ids or ()), *self.client.stop_ids})
            if request.plan is not None:
                transfer = {"kv_transfer_params": request.transfer_params}
                own.extra_args = (own.extra_args or {}) | transfer
            params.append(own)
        outputs = self.llm.generate(
            [TokensPrompt(prompt_token_ids=request.prompt_ids) for request in rendered],
            params,
            use_tqdm=False,
            lora_request=self._lora,
        )
        if any(one.finish_reason == "error" for output in outputs for one in output.outputs):
            raise LoadFailed("chunks could not be loaded, see the log; nothing was answered")
        return [
            Completion(
                output.outputs[0].text.strip(),
                tuple(output.outputs[0].token_ids),
                len(output.prompt_token_ids),
                output.num_cached_tokens or 0,
                output,
            )
            for output in outputs
        ]
