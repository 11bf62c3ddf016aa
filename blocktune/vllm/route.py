"""Chat completions with ``documents`` on vLLM's server, through ``vllm.endpoint_plugins``.

A request with documents is rendered here, and waits until its chunks are stored; then vLLM's own
route answers it. Requests without documents are passed on. ``VLLM_PLUGINS`` must name the plug-in.
Its configuration is in ``kv_connector_extra_config``: ``store``, ``adapters`` (folders by
their names in requests), ``fingerprint`` (of those that it fits) and ``encode_wait_s``.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from inspect import unwrap
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, ValidationError
from vllm.entrypoints.openai.chat_completion.api_router import create_chat_completion
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.models.protocol import BaseModelPath
from vllm.entrypoints.serve.utils.api_utils import (
    load_aware_call,
    validate_json_request,
    with_cancellation,
)

from blocktune.parsing import refuse_doubles
from blocktune.server.front import chat_pieces, read_documents, read_messages, read_method
from blocktune.server.schemas import (
    OWN_PLACE,
    Documents,
    Extension,
    Messages,
    refuse_fields,
    refuse_misspelt,
    validated,
)
from blocktune.vllm.client import ChunkClient, Rendered, open_clients
from blocktune.vllm.plan import PARAMS, Segment

POLL_S, ASK_S = 0.05, 1.0  # seconds after which chunks are looked for, and asked for, again
ROUTE = "/v1/chat/completions"
OWN = ("documents", "blocktune")
"""Fields that vLLM does not know."""
REFUSED = (
    *("prompt_logprobs", "echo", "tools", "functions", "continue_final_message"),
    *("truncate_prompt_tokens", "chat_template", "chat_template_kwargs", "add_special_tokens"),
    *("reasoning_effort", "return_token_offsets", "return_prompt_text", "kv_transfer_params"),
    "use_beam_search",  # vLLM then makes new requests, without the chunks
)
"""Fields that change the prompt, or need what was not computed."""


class DocumentRequest(BaseModel):
    """The fields of a request that are read here; the others are vLLM's."""

    model: str | None = None
    messages: Messages
    documents: Documents | None = None
    blocktune: Extension | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None


class Renderer:
    """Turns requests with documents into requests of vLLM."""

    def __init__(self, clients: Mapping[str, ChunkClient], loras: Mapping[str, Any], wait_s: float):
        """By name: ``clients`` of models and adapters; vLLM's ``loras``, which may be replaced."""
        self.clients, self.wait_s = clients, wait_s
        self.loras, self._first = loras, dict(loras)

    async def prepare(self, body: dict[str, Any]) -> dict[str, Any]:
        """Returns the body for vLLM. Raises ValueError in one line, or HTTPException (404, 503)."""
        refuse_fields(body, OWN_PLACE)
        refuse_misspelt(body, list(OWN), ChatCompletionRequest.model_fields)
        name = next(iter(self.clients)) if body.get("model") is None else body["model"]
        client = self.clients.get(name) if isinstance(name, str) else None
        body = body | {"model": name}
        if not _has_documents(body):
            return body
        request = validated(DocumentRequest.model_validate, body)
        asked = {name: body.get(name) for name in REFUSED}
        asked["add_generation_prompt: false"] = body.get("add_generation_prompt") is False
        asked["blocktune.strip"] = request.blocktune and request.blocktune.strip
        if refused := next((name for name, value in asked.items() if value), None):
            raise ValueError(f"{refused} is not supported with documents; leave it out")
        if client is None:
            raise HTTPException(404, f"no model '{name:.80}'; served: {', '.join(self.clients)}")
        if client.lora and self.loras.get(name) is not self._first.get(name):
            raise ValueError(
                f"adapter '{name}' was replaced or unloaded, but not its chunks; restart the server"
            )
        rendered, question = await asyncio.to_thread(_render, client, request)
        await self._encoded(client, rendered)
        kept = {key: value for key, value in body.items() if key not in OWN}
        if not body.get("ignore_eos"):
            kept["stop_token_ids"] = sorted({*(request.stop_token_ids or ()), *client.stop_ids})
        return kept | {
            "messages": [{"role": "user", "content": question}],
            "kv_transfer_params": {"prompt_token_ids": rendered.prompt_ids}
            | (rendered.transfer_params or {}),
        }

    async def _encoded(self, client: ChunkClient, rendered: Rendered) -> None:
        is_queued = client.store.queue.folder is not None  # by remotes alone, nothing is encoded
        deadline = time.monotonic() + (self.wait_s if is_queued else 0)
        missing: list[Segment] = []
        asked = float("-inf")
        try:
            while missing := await asyncio.to_thread(client.missing, rendered.plan):
                now = time.monotonic()
                if now - asked >= ASK_S:
                    asked = now
                    await asyncio.to_thread(client.ask_for, missing)
                if now >= deadline:
                    raise HTTPException(
                        503,
                        f"chunks not encoded yet: {len(missing)}; run `blocktune encode` (--follow "
                        "if the store has a folder) and ask again",
                        {"Retry-After": "5"},
                    )
                await asyncio.sleep(POLL_S)
        except asyncio.CancelledError:  # the client left; others that wait for them ask again
            with suppress(OSError, ValueError):  # the queue is another user's; no chunks at all
                wanted = [segment.wanted for segment in missing]
                client.store.queue.done(client.fingerprint, wanted)
            raise


def _has_documents(body: Mapping[str, Any]) -> bool:
    if body.get("documents") or body.get("blocktune"):
        return True
    messages = body.get("messages")
    contents = [m.get("content") for m in messages or () if isinstance(m, Mapping)]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return any(isinstance(part, Mapping) and part.get("type") == "document" for part in parts)


def _render(client: ChunkClient, request: DocumentRequest) -> tuple[Rendered, str]:
    conversation = read_messages(request.messages)
    chunks = read_documents([*(request.documents or ()), *conversation.documents])
    method = client.built(read_method(request.blocktune or Extension(), client.method))
    block = client.prompts.spec(method).block
    pieces = chat_pieces(client.tokenizer, client.format, chunks, conversation, block)
    limit = request.max_completion_tokens or request.max_tokens or 1
    return client.render(pieces, method, limit), conversation.question


async def require_read(raw_request: Request) -> None:
    """Checks the body of a request to any route of vLLM, as `validate_json_request` does.

    Refuses documents where vLLM would ignore them, and plans with beams, which lack them.
    """
    await validate_json_request(raw_request)
    try:
        body = await raw_request.json()
    except (RecursionError, ValueError) as error:
        raise HTTPException(400, f"the request is not JSON that can be read: {error}") from None
    body = body if isinstance(body, dict) else {}
    unread = next((name for name in OWN if body.get(name)), None)
    if unread and not raw_request.url.path.endswith(ROUTE):
        raise HTTPException(400, f"{unread} is read by {ROUTE} only; drop it")
    params = body.get("kv_transfer_params")
    if body.get("use_beam_search") and isinstance(params, dict) and params.get(PARAMS) is not None:
        raise HTTPException(400, "use_beam_search excludes cached chunks; leave it out")


class DocumentsRoute:
    """The plug-in; see vLLM's ``EndpointPlugin``."""

    name = "blocktune"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Replaces vLLM's route, and the check of its others."""
        app.dependency_overrides[validate_json_request] = require_read

        answer = unwrap(create_chat_completion)  # its own cancellation would not work within ours

        @app.post(ROUTE, dependencies=[Depends(require_read)])
        @with_cancellation
        @load_aware_call
        async def chat(raw_request: Request) -> Any:
            """OpenAI's chat completions, with documents."""
            body = await raw_request.json()
            try:
                if isinstance(body, dict):
                    body = await raw_request.app.state.blocktune.prepare(body)
                request = ChatCompletionRequest.model_validate(body)
            except ValidationError as error:
                raise RequestValidationError(error.errors(), body=body) from None
            except ValueError as error:
                raise HTTPException(400, " ".join(str(error).split())) from None
            return await answer(request, raw_request)

    async def init_state(self, engine_client, state, args) -> None:
        """Opens the store. Raises ValueError if an adapter cannot be served."""
        extra = args.kv_transfer_config.kv_connector_extra_config
        names = args.served_model_name or [args.model]
        own = extra["store"], extra.get("fingerprint")
        model = f"{args.model}@{args.revision}" if args.revision else args.model
        plain, clients = open_clients(model, extra.get("adapters") or {}, *own)
        refuse_doubles("model or adapter", [*names, *clients], "name it: NAME=ADAPTER")
        served = state.openai_serving_models
        for name in (name for name, client in clients.items() if client.lora is None):
            # It only encodes: to vLLM it is the base.
            served.base_model_paths.append(BaseModelPath(name=name, model_path=args.model))
        clients |= dict.fromkeys(names, plain)
        for client in clients.values():
            room = min(client.prompts.max_tokens, engine_client.model_config.max_model_len)
            client.prompts = replace(client.prompts, max_tokens=room)
        wait_s = extra.get("encode_wait_s", 30)
        state.blocktune = Renderer(clients, served.lora_requests, float(wait_s))
