"""Response bodies: OpenAI's, whole or in pieces of a stream, with a ``blocktune`` field."""

import random
import time
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from blocktune.engine.encode import Piece
from blocktune.server.decoding import TokenLogprob, token_text
from blocktune.server.job import Delta, Event, Job, Report

_IDS = random.Random()  # ids are not secret, and the system's randomness would take longer


def chunk_list(job: Job, report: Report) -> dict[str, Any]:
    """The response of ``POST /v1/chunks``."""
    pieces = job.wanted[-len(job.documents) :]
    data = []
    for chunk, piece in zip(_chunks(job, report, pieces), pieces, strict=True):
        facts = {name: chunk[name] for name in ("key", "id", "tokens", "cached")}
        data.append(facts | {"encoded": chunk["cached"] == "none", "pinned": piece in job.pinned})
    return {"object": "list", "data": data, "encode_s": report.encode_s}


def _chunks(job: Job, report: Report, pieces: Sequence[Piece]) -> list[dict[str, Any]]:
    """Id of each document (the last ``pieces``) and, if it was looked up, size, key and tier."""
    chunks, count = [], len(job.documents)
    for index, document in enumerate(job.documents):
        own = document.metadata.get("id")
        own = own if isinstance(own, str | int) else None
        chunk = {"index": index, "id": own, "title": document.title}
        if len(pieces) >= count:
            piece = pieces[index - count]
            chunk["tokens"], chunk["cached"] = len(piece.ids), report.tiers.get(piece, "none")
            chunk["key"] = job.tenant.sign(job.engine.state.encoder.key(piece))
        chunks.append(chunk)
    return chunks


class TextBodies:
    """Bodies of ``/v1/completions``; ``texts`` are the answers so far."""

    prefix, object_name, chunk_name = "cmpl", "text_completion", "text_completion"

    def __init__(self, job: Job):
        self.job, self.created = job, int(time.time())
        self.id = f"{self.prefix}-{_IDS.getrandbits(96):024x}"
        count, with_logprobs = job.settings.choices, job.settings.logprobs is not None
        self.texts, self.finish = [""] * count, [None] * count
        self.logprobs = [[] if with_logprobs else None for _ in self.texts]
        self.ends = [0] * count  # where the tokens end that were streamed with their logprobs
        self.token = partial(token_text, job.engine.tokenizer)  # the text of a token, by its id

    def add(self, event: Event) -> None:
        """Adds a delta to its choice."""
        if isinstance(event, Delta):
            self.texts[event.index] += event.text
            self.finish[event.index] = event.finish
            if event.logprob is not None:
                self.logprobs[event.index].append(event.logprob)

    def whole(self, report: Report) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        answers = zip(map(self.message, self.texts), self.logprobs, self.finish, strict=True)
        choices = [self._choice(index, *answer) for index, answer in enumerate(answers)]
        return self._frame(self.object_name, choices) | self._counts(report)

    def opening(self) -> list[dict[str, Any]]:
        """The first bodies of a stream."""
        return []

    def delta(self, event: Delta) -> list[dict[str, Any]]:
        """The bodies of one event of a stream."""
        index, log = event.index, event.logprob
        if not event.text and event.finish is None and log is None:
            return []  # part of a character, or perhaps the start of a stop text
        self.add(event)
        start, logs = self.ends[index], None if log is None else [log]
        if log is not None:
            self.ends[index] += len(self.token(log.token))
        choice = self._choice(index, self.piece(event.text), logs, event.finish, start)
        return [self._frame(self.chunk_name, [choice])]

    def closing(self, report: Report) -> dict[str, Any]:
        """The last chunk of a stream, with the usage."""
        return self._frame(self.chunk_name, []) | self._counts(report)

    def _choice(
        self, index: int, content: dict, logs=None, finish=None, start: int = 0
    ) -> dict[str, Any]:
        logprobs = None if logs is None else self.format_logprobs(logs, start)
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": finish}

    def message(self, text: str) -> dict[str, Any]:
        """The text of a whole choice."""
        return {"text": text}

    piece = message  # the new text of a streamed choice

    def format_logprobs(self, logs: list[TokenLogprob], offset: int) -> dict[str, Any]:
        """Log probabilities in the route's format; ``offset`` in characters."""
        names = [self.token(entry.token) for entry in logs]
        return {
            "tokens": names,
            "token_logprobs": [entry.logprob for entry in logs],
            # reversed: of tokens with the same text (parts of characters) the likeliest is shown
            "top_logprobs": [{self.token(i): p for i, p in reversed(entry.top)} for entry in logs],
            "text_offset": list(accumulate(map(len, names), initial=offset))[:-1],
        }

    def _frame(self, name: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        frame = {"id": self.id, "object": name, "created": self.created}
        return frame | {"model": self.job.model, "choices": choices}

    def _counts(self, report: Report) -> dict[str, Any]:
        job, usage = self.job, vars(report.usage).copy()
        read, written = usage["prompt_tokens"], report.answer_tokens
        counts = {
            "prompt_tokens": read,
            "completion_tokens": written,
            "total_tokens": read + written,
            "prompt_tokens_details": {"cached_tokens": report.cached_tokens},
        }
        ttft = vars(usage.pop("ttft")) | {"queue_s": report.queue_s, "total_s": report.ttft_s}
        extension = {
            "method": job.method.name,
            "chunks": _chunks(job, report, job.looked_up),
            "usage": usage | {"recompute_ratio": report.usage.recompute_ratio},
            "ttft": ttft,
        }
        extension |= {} if report.strip is None else {"strip": report.strip}
        return {"usage": counts, "blocktune": extension}


class ChatBodies(TextBodies):
    """Bodies of ``/v1/chat/completions``."""

    prefix, object_name, chunk_name = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self) -> list[dict[str, Any]]:
        """The role of every choice."""
        first = {"delta": {"role": "assistant", "content": ""}}
        choices = (self._choice(index, first) for index in range(len(self.texts)))
        return [self._frame(self.chunk_name, [choice]) for choice in choices]

    def message(self, text: str) -> dict[str, Any]:
        """The assistant's message."""
        return {"message": {"role": "assistant", "content": text}}

    def piece(self, text: str) -> dict[str, Any]:
        """New text of the message."""
        return {"delta": {"content": text} if text else {}}

    def format_logprobs(self, logs: list[TokenLogprob], offset: int) -> dict[str, Any]:
        """Log probabilities with bytes and alternatives."""

        def entry(index: int, value: float) -> dict[str, Any]:
            text = self.token(index)
            known = None if "\ufffd" in text else list(text.encode())  # of a whole character
            return {"token": text, "logprob": value, "bytes": known}

        return {
            "content": [
                entry(log.token, log.logprob) | {"top_logprobs": [entry(*top) for top in log.top]}
                for log in logs
            ]
        }
