"""A response cache in front of the scheduler."""

from __future__ import annotations

import time

from blocktune.cache.responses import ResponseCache
from blocktune.engine.recall import Recall
from blocktune.server.job import Delta, Event, Job, Report


def recall(cache: ResponseCache | None, job: Job, question: str) -> bool:
    """Answers a job from the cache, or has its answer kept when it has come.

    Requests for several choices, log probabilities or the prompt's strip, and those that draw
    without a seed, pass by. Nothing is kept of an answer whose client left.

    Returns:
        Whether the job is answered, so that it must not be queued.
    """
    settings = job.settings
    if job.pieces is None or job.strip or settings.choices > 1 or settings.logprobs is not None:
        return False
    own = Recall.of(cache, job.engine.state, job.method, settings.sampling, settings)
    if own is None:
        return False
    known = own.find(0, job.pieces, question)
    if known is not None:
        facts, usage = known
        job.emit(Delta(0, facts["text"], None, facts["finish"]))
        ttft_s = time.perf_counter() - job.created
        job.emit(Report(usage=usage, answer_tokens=facts["count"], ttft_s=ttft_s))
        return True
    emit, said = job.emit, []

    def listen(event: Event) -> None:
        if isinstance(event, Delta):
            said.append(event)
        emit(event)
        if isinstance(event, Report):
            text, finish = "".join(delta.text for delta in said), said[-1].finish
            facts = {"text": text, "finish": finish, "count": event.answer_tokens}
            own.keep(0, job.pieces, question, facts, time.perf_counter() - job.created)

    job.emit = listen
    return False
