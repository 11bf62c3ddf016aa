"""The served models, and the jobs made from validated requests."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from blocktune.adapter.load import load_models
from blocktune.cache import ChunkStore, PrefixTree, states_key
from blocktune.cache.responses import ResponseCache
from blocktune.cache.store.config import StoreConfig
from blocktune.check import check_model
from blocktune.engine import Engine, Sampling
from blocktune.engine.encode import documents_of
from blocktune.engine.prompts import TooLong
from blocktune.methods import Method, build, default_method
from blocktune.parsing import refuse_doubles, split_name
from blocktune.prompt import Chunk, Pieces
from blocktune.prompt.special_tokens import OWNER
from blocktune.server import front, schemas
from blocktune.server.config import Quotas, ServerConfig, Tenant
from blocktune.server.decoding import Settings
from blocktune.server.job import Job, bytes_per_token
from blocktune.server.middleware import Metrics
from blocktune.server.scheduler import Scheduler

_LOG = logging.getLogger(__name__)
MOST_BLANKS = 64
CHARACTERS = 32  # most of a token, to refuse texts that are too long before they are tokenised
WITHOUT_CHUNKS = "prefix-cache"  # the method of prompts without documents


def load_engines(
    model: str | None,
    adapters: list[str],
    name: str | None,
    store: str | None,
    store_bytes: int,
    **options: Any,
) -> dict[str, Engine]:
    """An engine for each adapter and for the bare model, over one base's weights and one store.

    The arguments are those of ``blocktune serve``; ``options`` are `load_models`' own. There are
    ``store_bytes`` for chunks, and again for exact prefixes. Raises ValueError if two have the same
    name, or a model cannot reuse chunks.
    """
    wanted = [(label or _short(path), path) for label, path in map(split_name, adapters)]
    if name or not adapters:
        wanted.append((name or _short(model or ""), None))
    labels, names = map(list, zip(*wanted, strict=True))
    refuse_doubles("model or adapter", labels, "name it: NAME=ADAPTER")
    loaded = load_models(model, names, recurrent=False, **options)
    config = StoreConfig.parse(store or "", memory=store_bytes)
    kept = {"store": ChunkStore(device=loaded[0].model.device, config=config)}
    kept["prefix_tree"] = PrefixTree(max(1, store_bytes), store=kept["store"])
    return {
        label: Engine(base, tokenizer, adapter=info, adapter_folder=folder, **kept)
        for label, (base, tokenizer, info, folder) in zip(labels, loaded, strict=True)
    }


def _short(source: str) -> str:
    return Path(source).resolve().name if Path(source).exists() else source


class Served(NamedTuple):
    """A model: its engine, its default method, and the bytes of one token's keys and values."""

    name: str
    engine: Engine
    method: Method
    token_bytes: int


class Service:
    """The models, limits and scheduler behind the routes.

    The first of the ``engines``, which are given by their names in requests, is the default, and so
    is ``method`` (None: the one that each model was trained for). If ``checked``, every model must
    pass `check_model` before the first answer. ValueError: the method does not fit a model.
    """

    def __init__(
        self,
        engines: Mapping[str, Engine],
        config: ServerConfig,
        method: str | None = None,
        checked: bool = True,
        responses: ResponseCache | None = None,
    ):
        self.config, self.created, self.responses = config, int(time.time()), responses
        self.models = {
            name: Served(
                name,
                engine,
                default_method(engine.prompts.trained) if method is None else build(method),
                bytes_per_token(engine),
            )
            for name, engine in engines.items()
        }
        for served in self.models.values():
            served.engine.prompts.spec(served.method)
            served.engine.store.may_load = True
            served.engine.state.prefixes(served.method)  # loads the method's own embedding model
        for served in self.models.values():  # requests load none
            served.engine.state.auxiliaries.may_load = served.engine.store.may_load = False
        self.faults: list[str] = []
        self.ready, self._checked = False, checked
        self.scheduler = Scheduler(config.limits, self._check)
        for store in self.stores:
            self.scheduler.pinned |= store.pinned()  # by earlier servers, or `blocktune store pin`
        self.metrics, self.quotas = Metrics(self.scheduler), Quotas()

    def _check(self) -> None:
        """Runs the correctness check before the first request; a failure keeps `ready` False."""
        try:
            for name, served in self.models.items() if self._checked else ():
                failed = [check.name for check in check_model(served.engine) if not check.passed]
                self.faults += [f"{name}: {fault}" for fault in failed]
        except Exception as error:
            _LOG.exception("the correctness check did not run")
            self.faults.append(f"the check did not run: {error}")
        self.ready = not self.faults

    @property
    def stores(self) -> set[ChunkStore]:
        """The stores of all models."""
        return {served.engine.store for served in self.models.values()}

    def stop(self) -> None:
        """Finishes what was accepted, and the files that wait for a remote."""
        self.scheduler.stop()
        for store in self.stores:  # SIGTERM ends the process without doing this
            store.flush()

    def model(self, name: str | None) -> Served:
        """A model by its name; None: the first. Raises `WrongField` if none has this name."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            told = f"no model '{name:.80}'; served: {', '.join(self.models)}"
            raise schemas.WrongField(told, "model", 404, "model_not_found")
        return self.models[name]

    def chat(self, body: schemas.ChatRequest, tenant: Tenant) -> Job:
        """The job of a chat request. Raises ValueError, with the reason, if it has no answer."""
        conversation = front.read_messages(body.messages)
        documents = [*(body.documents or ()), *conversation.documents]
        read = partial(front.chat_pieces, conversation=conversation)
        job = self._job(body, tenant, documents, conversation.texts, read)
        job.has_turns, job.question = bool(conversation.earlier), conversation.question
        return job

    def completion(self, body: schemas.CompletionRequest, tenant: Tenant) -> Job:
        """The job of a plain completion. Raises ValueError as `chat` does."""
        text = body.prompt if isinstance(body.prompt, str) else ""
        read = partial(front.plain_pieces, prompt=body.prompt)
        job = self._job(body, tenant, body.documents or (), [text], read)
        job.question = text
        return job

    def encoding(self, body: schemas.ChunksRequest, tenant: Tenant) -> Job:
        """The job that encodes documents for the default method; ValueError: they do not fit."""
        served, limits = self._served(body, tenant), self.config.limits
        chunks, engine = self._chunks(served, body.documents, []), served.engine
        prefix, pieces = engine.prompts.encodable(chunks, served.method)
        if body.pin:
            keys = {engine.state.encoder.key(piece): len(piece.ids) for piece in pieces}
            pinned = self.scheduler.pinned.copy()
            new = sum(size for key, size in keys.items() if key not in pinned)
            room = limits.pinned_bytes - sum(pinned.values())
            if new * served.token_bytes > room:
                left = f"the {max(0, room):,} bytes left for pinned chunks"
                raise ValueError(f"pin: {new:,} tokens do not fit into {left}; delete some")
        return Job(
            *(engine, tenant, chunks, limits.request_s, served.method),
            wanted=[*([prefix] if prefix else []), *pieces],
            names=documents_of(pieces, chunks),
            pins=frozenset(pieces) if body.pin else frozenset(),
        )

    def chunk(self, name: str, key: str) -> dict[str, Any]:
        """Whether a chunk is stored; ``name`` is the tenant's signed name of the store ``key``."""
        is_stored = any(key in store for store in self.stores)
        pinned = any(store.is_pinned(key) for store in self.stores)
        facts = {"key": name, "id": None, "tokens": None, "encoded": False, "pinned": pinned}
        return facts | {"cached": "stored" if is_stored else "none"}

    def discard(self, key: str) -> bool:
        """Removes a chunk and its hidden states, pinned or not. Returns whether all could be."""
        self.scheduler.pinned.pop(key, None)
        layers = range(max(served.engine.state.num_layers for served in self.models.values()))
        keys = key, *(states_key(key, layer) for layer in layers)
        done = [store.discard(*keys) for store in self.stores]
        return all(done)

    def card(self, name: str) -> dict[str, Any]:
        """The description of a model in ``/v1/models``; `WrongField` if there is none."""
        served = self.model(name)
        card = {"id": name, "object": "model", "created": self.created, "owned_by": "blocktune"}
        longest, method = served.engine.prompts.longest, served.method.name
        return card | {"max_model_len": longest, "method": method}

    def _served(self, body: schemas.Decoding | schemas.ChunksRequest, tenant: Tenant) -> Served:
        """A request's model, with the tenant's own caches of chunks and of tokenised texts."""
        served, salt = self.model(body.model), tenant.salt(body.cache_salt)
        OWNER.set(salt)  # a context variable, so it is set for this request only
        return served._replace(engine=served.engine.salted(salt, tenant.payer))

    def _chunks(
        self, served: Served, documents: Sequence[Any], texts: Iterable[str]
    ) -> tuple[Chunk, ...]:
        limits = self.config.limits
        if (count := len(documents)) > limits.chunks:
            raise ValueError(f"documents: at most {limits.chunks:,} are taken, got {count:,}")
        chunks = front.read_documents(documents)
        whole = sum(len(chunk.text) + len(chunk.title or "") for chunk in chunks)
        whole += sum(map(len, texts))
        room = CHARACTERS * min(limits.prompt_tokens, served.engine.prompts.longest)
        if whole > room:
            raise TooLong(f"{whole:,} characters were given, the model reads {room:,} at most")
        return chunks

    def _job(
        self,
        body: schemas.Decoding,
        tenant: Tenant,
        documents: Sequence[Any],
        texts: Iterable[str],
        read: Callable[..., Pieces],
    ) -> Job:
        served = self._served(body, tenant)
        chunks = self._chunks(served, documents, texts)
        limits, prompts = self.config.limits, served.engine.prompts
        method = front.read_method(body.blocktune or schemas.Extension(), served.method)
        if method.warm_up:
            raise ValueError("blocktune: warm_up is for measurements; leave it out")
        method = method if chunks else build(WITHOUT_CHUNKS)
        spec = prompts.spec(method)
        pieces = read(prompts.tokenizer, prompts.format, chunks, block=spec.block)
        if not method.keeps_context:
            pieces = pieces._replace(chunks=())
        if spec.num_blanks > MOST_BLANKS:
            raise ValueError(f"blocktune: at most {MOST_BLANKS} blanks, got {spec.num_blanks}")
        if pieces.num_tokens > limits.prompt_tokens:
            sizes = f"{pieces.num_tokens:,} tokens, the server takes {limits.prompt_tokens:,}"
            raise TooLong(f"the prompt has {sizes}; cut chunks smaller or retrieve fewer")
        new_tokens = body.max_completion_tokens or body.max_tokens
        for name, value, most in (
            ("max_tokens", new_tokens, limits.new_tokens),
            ("n", body.n, limits.choices),
        ):
            if value is not None and value > most:
                raise ValueError(f"{name} must be at most {most:,}, got {value:,}")
        prompt = prompts.prompt(pieces, spec, new_tokens or 1)
        if new_tokens is None:
            room = prompts.room(prompt)
            new_tokens = min(limits.default_new_tokens, limits.new_tokens, room)
        top_k, top_p = max(0, body.top_k or 0), body.top_p or 1.0
        sampling = Sampling(body.temperature or 0.0, top_k, top_p, body.seed)
        count, strips = body.n or 1, isinstance(body, schemas.ChatRequest)
        job = Job(
            *(served.engine, tenant, chunks, limits.request_s, method, pieces),
            prompt=prompt if method.history is None else None,
            settings=Settings(new_tokens, sampling, count, body.stops, body.num_logprobs, strips),
            model=served.name,
            strip=bool(body.blocktune and body.blocktune.strip),
            token_bytes=served.token_bytes,
        )
        if job.reserved > limits.kv_bytes:
            sizes = f"{job.reserved:,} bytes of keys and values, the server has {limits.kv_bytes:,}"
            raise ValueError(f"the answer needs {sizes}; ask for fewer tokens or choices")
        return job
