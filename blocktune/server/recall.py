"""A response cache in front of the scheduler."""

from __future__ import annotations

import time

from blocktune.cache.responses import ResponseCache
from blocktune.engine.recall import Recall
from blocktune.server.job import Delta, Event, Job, Report


def recall(cache: ResponseCache, job: Job, question: str) -> bool:
    """Answers a job from the cache (True), or has its answer kept when it has come.

    Requests for several choices, log probabilities or the prompt's strip, and those that draw
    without a seed, pass by. Nothing is kept of an answer whose client left.
    """
    settings, emit, said = job.settings, job.emit, []
    if job.pieces is None or job.strip or settings.choices > 1 or settings.logprobs is not None:
        return False
    decoding, asked = (settings.sampling, settings), (0, job.pieces, question)
    own = Recall.of(cache, job.engine.state, job.method, decoding, asked)
    if own is None:
        return False
    if (known := own.find()) is not None:
        emit(Delta(0, known[0]["text"], None, known[0]["finish"]))
        ttft_s = time.perf_counter() - job.created
        emit(Report(usage=known[1], answer_tokens=known[0]["count"], ttft_s=ttft_s))
        return True

    def listen(event: Event) -> None:
        if isinstance(event, Delta):
            said.append(event)
        if isinstance(event, Report):  # kept before the client knows that its answer has ended
            facts = {"finish": said[-1].finish, "count": event.answer_tokens}
            text, seconds = "".join(delta.text for delta in said), time.perf_counter() - job.created
            own.keep(text, (), seconds, **facts)
        emit(event)

    job.emit = listen
    return False
