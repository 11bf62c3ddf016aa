"""Response bodies: OpenAI's, whole or in pieces of a stream, with a ``blocktune`` field."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from blocktune.engine.encode import Piece
from blocktune.server.config import Tenant
from blocktune.server.decoding import TokenLogprob
from blocktune.server.job import Delta, Event, Report, usage_fields
from blocktune.server.schemas import ChunkList, ChunkStatus
from blocktune.server.service import Asked

_IDS = random.Random()
"""Ids of answers are no secrets; the system's randomness takes longer than the rest of a body."""


def chunk_list(asked: Asked, tenant: Tenant, report: Report) -> ChunkList:
    """What ``POST /v1/chunks`` answers."""
    data = [
        ChunkStatus(
            **{name: one[name] for name in ("key", "id", "tokens", "cached")},
            encoded=one["cached"] == "none",
            pinned=bool(asked.job.pins),
        )
        for one in _chunks(asked, tenant, report, asked.job.wanted)
    ]
    return ChunkList(data=data, encode_s=report.encode_s)


def _chunks(
    asked: Asked, tenant: Tenant, report: Report, pieces: Sequence[Piece]
) -> list[dict[str, Any]]:
    """Per document its id, size, key and where it was found; ``pieces`` end with the documents'."""
    count = len(asked.sources)
    pieces = pieces[-count:] if len(pieces) >= count else ()  # none if none was looked up
    encoder = asked.job.engine.state.encoder
    return [
        {
            "index": index,
            "id": source.id,
            "title": source.chunk.title,
            "tokens": len(piece.ids),
            "cached": report.tiers.get(piece, "none"),
            "key": tenant.sign(encoder.key(piece)),
        }
        for index, (source, piece) in enumerate(zip(asked.sources, pieces, strict=False))
    ]


class Bodies:
    """Response bodies of one route. ``texts`` are the answers so far."""

    prefix = object_name = chunk_name = ""

    def __init__(self, asked: Asked, tenant: Tenant):
        self.asked, self.tenant = asked, tenant
        self.id, self.created = f"{_IDS.getrandbits(96):024x}", int(time.time())
        job = asked.job
        self.texts = [""] * job.settings.choices
        self.finish: list[str | None] = [None] * job.settings.choices
        self.logprobs: list[list[TokenLogprob]] = [[] for _ in self.texts]
        self.tokenizer = job.engine.tokenizer
        self.wants_logprobs = job.settings.logprobs is not None

    def add(self, event: Event) -> None:
        """Takes a delta in."""
        if isinstance(event, Delta):
            self.texts[event.index] += event.text
            self.finish[event.index] = event.finish
            if event.logprob is not None:
                self.logprobs[event.index].append(event.logprob)

    def whole(self, report: Report) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        choices = [
            {
                "index": index,
                **self.message(text),
                "logprobs": self.shown(self.logprobs[index], 0) if self.wants_logprobs else None,
                "finish_reason": self.finish[index],
            }
            for index, text in enumerate(self.texts)
        ]
        return self._frame(self.object_name, choices) | self._counts(report)

    def opening(self) -> list[dict[str, Any]]:
        """What a stream begins with."""
        return []

    def delta(self, event: Event) -> list[dict[str, Any]]:
        """The bodies of one event of a stream."""
        assert isinstance(event, Delta)
        before = len(self.texts[event.index])
        self.add(event)
        if not event.text and event.finish is None and event.logprob is None:
            return []  # part of a character, or the beginning of a stop text
        logs = None if event.logprob is None else self.shown([event.logprob], before)
        return [self._choice(event.index, self.piece(event.text), logs, event.finish)]

    def _choice(self, index: int, piece: dict, logs=None, finish=None) -> dict[str, Any]:
        """A body of a stream with news of one choice."""
        choice = {"index": index, **piece, "logprobs": logs, "finish_reason": finish}
        return self._frame(self.chunk_name, [choice])

    def closing(self, report: Report) -> dict[str, Any]:
        """The last chunk of a stream, with the usage."""
        return self._frame(self.chunk_name, []) | self._counts(report)

    def message(self, text: str) -> dict[str, Any]:
        """The text of a whole choice."""
        return {"text": text}

    def piece(self, text: str) -> dict[str, Any]:
        """The text of a streamed one."""
        return {"text": text}

    def shown(self, logs: list[TokenLogprob], offset: int) -> dict[str, Any]:
        """Log probabilities as the route's clients want them; ``offset`` in characters."""
        names = [self.token(one.token) for one in logs]
        offsets = []
        for name in names:
            offsets.append(offset)
            offset += len(name)
        return {
            "tokens": names,
            "token_logprobs": [one.logprob for one in logs],
            "top_logprobs": [{self.token(i): value for i, value in one.top} for one in logs],
            "text_offset": offsets,
        }

    def token(self, index: int) -> str:
        """The text of a token."""
        return self.tokenizer.decode([index])

    def _frame(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": name,
            "created": self.created,
            "model": self.asked.served.name,
            "choices": choices,
        }

    def _counts(self, report: Report) -> dict[str, Any]:
        read, written = report.usage.prompt_tokens, report.answer_tokens
        usage = {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": report.cached_tokens},
        }
        return {"usage": usage, "blocktune": self._extension(report)}

    def _extension(self, report: Report) -> dict[str, Any]:
        """The ``blocktune`` field of an answer."""
        usage = usage_fields(report.usage)
        ttft = usage.pop("ttft") | {"queue_s": report.queue_s, "total_s": report.ttft_s}
        chunks = _chunks(self.asked, self.tenant, report, self.asked.job.looked_up)
        for index, source in enumerate(self.asked.sources if not chunks else ()):
            chunks.append({"index": index, "id": source.id, "title": source.chunk.title})
        made = {"method": self.asked.job.method.name, "chunks": chunks, "usage": usage}
        made["ttft"] = ttft
        return made | ({} if report.strip is None else {"strip": report.strip})


class TextBodies(Bodies):
    """Of ``/v1/completions``."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"


class ChatBodies(Bodies):
    """Of ``/v1/chat/completions``."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        """The role of every choice."""
        first = {"delta": {"role": "assistant", "content": ""}}
        return [self._choice(index, first) for index in range(len(self.texts))]

    def message(self, text: str) -> dict[str, Any]:
        """A message of the assistant."""
        return {"message": {"role": "assistant", "content": text}}

    def piece(self, text: str) -> dict[str, Any]:
        """New text of it."""
        return {"delta": {"content": text} if text else {}}

    def shown(self, logs: list[TokenLogprob], offset: int) -> dict[str, Any]:
        """Log probabilities with bytes and alternatives."""

        def entry(index: int, value: float) -> dict[str, Any]:
            text = self.token(index)
            return {"token": text, "logprob": value, "bytes": list(text.encode())}

        return {
            "content": [
                entry(one.token, one.logprob) | {"top_logprobs": [entry(*top) for top in one.top]}
                for one in logs
            ]
        }
