"""What runs when: bounds of queue, memory and time, turns, what is encoded once, what is freed."""

import gc
import threading
import weakref
from collections import deque
from unittest.mock import Mock

import pytest
from server.support import CHAT, chat, metric, refused, wait_until
from starlette.exceptions import HTTPException

from blocktune.engine.encode import Encoder
from blocktune.server import Limits, Tenant, scheduler
from blocktune.server.scheduler import Scheduler


def blocked(monkeypatch):
    """Encoding waits for the event that is returned."""
    go, find = threading.Event(), Encoder.find

    def waiting(self, *args, **kwargs):
        assert go.wait(30)
        return find(self, *args, **kwargs)

    monkeypatch.setattr(Encoder, "find", waiting)
    return go


def in_background(client, bodies) -> tuple[list, list[threading.Thread]]:
    done: list = []
    threads = [
        threading.Thread(target=lambda body=body: done.append(client.post(CHAT, json=body)))
        for body in bodies
    ]
    for thread in threads:
        thread.start()
    return done, threads


def test_the_queue_has_a_bound_and_then_answers_429(serve, monkeypatch):
    client = serve(limits={"queue": 2, "running": 1})
    go = blocked(monkeypatch)
    scheduler = client.service.scheduler
    done, threads = in_background(client, [chat(documents=["Text 0."])])
    wait_until(lambda: scheduler.kv_bytes > 0)  # admitted
    more, others = in_background(client, [chat(documents=[f"Text {i}."]) for i in (1, 2)])
    wait_until(lambda: scheduler.waiting == 2)
    full = client.post(CHAT, json=chat())
    refused(full, 429, "waiting")
    assert int(full.headers["retry-after"]) >= 1
    assert metric(client.get("/metrics").text, "num_requests_waiting") == 2
    go.set()
    for thread in threads + others:
        thread.join()
    assert [one.status_code for one in done + more] == [200] * 3


def test_a_client_that_leaves_while_its_chunks_are_encoded_makes_room(serve, monkeypatch):
    """Its prompt is not computed, and the next request does not wait for another step."""
    from blocktune.server import scheduler

    real, prefilled = scheduler.prefill_batch, []
    monkeypatch.setattr(
        scheduler, "prefill_batch", lambda *how: prefilled.append(how[1]) or real(*how)
    )
    client = serve(limits={"running": 1})
    go = blocked(monkeypatch)
    done, threads = in_background(client, [chat(documents=["A text that nobody reads."])])
    wait_until(lambda: client.service.scheduler.kv_bytes > 0)
    [left] = client.service.scheduler.preparing
    left.emit(HTTPException(499, "the client has left"))
    left.cancelled = True
    more, others = in_background(client, [chat(documents=["Anna Belt is in Kirby."])])
    wait_until(lambda: client.service.scheduler.waiting == 1)
    go.set()
    for thread in threads + others:
        thread.join()
    assert [one.status_code for one in done + more] == [499, 200]
    assert len(prefilled) == 1


def test_tenants_take_turns(serve, monkeypatch):
    client = serve(
        limits={"running": 1}, tenants=(Tenant("a", "key-of-a"), Tenant("b", "key-of-b"))
    )
    go = blocked(monkeypatch)
    order: list[str] = []

    def ask(name: str, index: int) -> None:
        body = chat(documents=[f"Text {name} {index}."], max_tokens=1)
        client.post(CHAT, json=body, headers={"authorization": f"Bearer key-of-{name}"})
        order.append(name)

    names = ["a", "a", "a", "a", "b"]
    threads = []
    for index, name in enumerate(names):
        threads.append(threading.Thread(target=ask, args=(name, index)))
        threads[-1].start()
        wait_until(lambda index=index: client.service.scheduler.waiting == index)
    go.set()
    for thread in threads:
        thread.join()
    assert "b" in order[:3]


def test_requests_that_never_fit_are_refused_and_others_wait_for_room(serve):
    client = serve(limits={"kv_bytes": 2_000_000})
    refused(client.post(CHAT, json=chat(max_tokens=2000)), 400, "bytes")
    done, threads = in_background(client, [chat(max_tokens=100, n=1)] * 4)
    for thread in threads:
        thread.join()
    assert [one.status_code for one in done] == [200] * 4
    assert client.service.scheduler.kv_bytes == 0


def test_a_request_that_takes_too_long_is_given_up(serve):
    client = serve(limits={"request_s": 1e-6})
    refused(client.post(CHAT, json=chat()), 408)
    assert not client.service.scheduler.running
    assert client.service.scheduler.kv_bytes == 0


def test_many_missing_chunks_are_encoded_in_parts(serve, monkeypatch, engine):
    engine.forget()
    client = serve(limits={"prefill_tokens": 20})
    sizes, find = [], Encoder.find

    def seen(self, pieces, *args, **kwargs):
        found = find(self, pieces, *args, **kwargs)
        sizes.append(sum(len(piece.ids) for piece in found.misses))
        return found

    monkeypatch.setattr(Encoder, "find", seen)
    documents = [f"The number {i} is the number of the house." for i in range(8)]
    assert client.post(CHAT, json=chat(documents=documents)).status_code == 200
    assert len([size for size in sizes if size]) >= 8


def test_a_chunk_that_several_requests_miss_is_encoded_once(serve, monkeypatch, engine):
    engine.forget()
    client = serve(limits={"prefill_tokens": 20})
    encoded, find = [], Encoder.find

    def seen(self, pieces, *args, **kwargs):
        found = find(self, pieces, *args, **kwargs)
        encoded.extend(found.misses)
        return found

    monkeypatch.setattr(Encoder, "find", seen)
    documents = [f"The number {i} is the number of the street." for i in range(12)]
    done, threads = in_background(client, [chat(documents=documents, max_tokens=1)] * 4)
    for thread in threads:
        thread.join()
    assert [one.status_code for one in done] == [200] * 4
    assert len(encoded) == len(set(encoded)) > len(documents)


@pytest.mark.parametrize("method", ["naive", "cacheblend", "ape", "prefix-cache", "full-prefill"])
def test_keys_and_values_are_freed_when_a_request_ends(client, monkeypatch, method):
    """At once: Python looks for cycles only after many allocations, and a prompt is one."""
    from blocktune.server import scheduler

    real, caches = scheduler.prefill_batch, []

    def seen(*args):
        run = real(*args)
        caches.append(weakref.ref(run.cache))
        return run

    monkeypatch.setattr(scheduler, "prefill_batch", seen)
    gc.collect()
    gc.disable()
    try:
        for stream in (False, True):
            body = chat(blocktune={"method": method}, n=2, stream=stream)
            assert client.post(CHAT, json=body).status_code == 200
        wait_until(lambda: not any(cache() is not None for cache in caches))
    finally:
        gc.enable()
    assert len(caches) == 2


def test_freed_memory_goes_back_to_the_system_when_idle(serve, monkeypatch):
    from blocktune.server import scheduler

    scheduler.trim_memory()  # there is something to call, or nothing to do
    given = threading.Event()
    monkeypatch.setattr(scheduler, "IDLE_S", 0.05)
    monkeypatch.setattr(scheduler, "trim_memory", given.set)
    assert serve().post(CHAT, json=chat()).status_code == 200
    assert given.wait(60)


def test_a_failure_is_of_one_request(client, monkeypatch):
    from blocktune.server import scheduler

    real = scheduler.prefill_batch

    def fail(state, prompts, pieces, method, found):
        if method.name == "epic":
            raise RuntimeError("secret path /etc/passwd")
        return real(state, prompts, pieces, method, found)

    monkeypatch.setattr(scheduler, "prefill_batch", fail)
    response = client.post(CHAT, json=chat(blocktune={"method": "epic"}))
    assert response.status_code == 500
    assert "secret" not in response.text
    assert client.post(CHAT, json=chat()).status_code == 200
    assert client.service.scheduler.kv_bytes == 0


@pytest.mark.parametrize("when", ["prefill", "decoding"])
def test_logits_that_are_no_numbers_fail_their_request(client, engine, monkeypatch, when):
    head, calls = engine.model.lm_head.forward, []

    def broken(hidden):
        calls.append(hidden.shape[0])
        return head(hidden) * (float("nan") if len(calls) > (when == "decoding") else 1.0)

    client.post(CHAT, json=chat())
    monkeypatch.setattr(engine.model.lm_head, "forward", broken)
    for temperature in (0, 1):
        calls.clear()
        refused(client.post(CHAT, json=chat(temperature=temperature)), 500, "not numbers")
    monkeypatch.undo()
    assert client.post(CHAT, json=chat()).status_code == 200


def test_a_request_that_is_prepared_counts_as_running(serve, monkeypatch):
    seen, prepare = [], Scheduler._prepare

    def counted(scheduler, job):
        seen.append(metric(client.get("/metrics").text, "num_requests_running"))
        return prepare(scheduler, job)

    monkeypatch.setattr(Scheduler, "_prepare", counted)
    client = serve()
    assert client.post(CHAT, json=chat()).status_code == 200
    assert set(seen) == {1}


def test_the_server_ends_though_the_model_is_busy_for_nobody(monkeypatch):
    """As with the check at the start, or a prompt of an hour whose client has left."""
    go = threading.Event()
    busy = Scheduler(Limits(), before=lambda: go.wait(30))
    monkeypatch.setattr(scheduler, "PASS_S", 0.01)
    busy.start()
    busy.stop()
    assert busy._thread.is_alive()
    job = Mock(cancelled=False, tenant=Tenant(), begun=0, timeout_s=1.0)
    busy._queues["default"] = deque([job])
    stopping = threading.Thread(target=busy.stop)
    stopping.start()
    stopping.join(0.1)
    assert stopping.is_alive()  # an answer that is awaited is finished
    job.cancelled = True
    go.set()
    stopping.join(30)
    assert not stopping.is_alive()
