"""API keys, tenants, salts and quotas: who may use which chunks, and how much."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from server.support import CHAT, DOCUMENTS, TINY, chat, refused
from starlette.testclient import TestClient

from blocktune.cache import ChunkStore
from blocktune.cache.store.remote import FsspecBlobs
from blocktune.cache.store.shelf import Shelf
from blocktune.engine import Engine
from blocktune.server import ServerConfig, Service, Tenant, create_app, load_tenants
from blocktune.server.config import OnlyTenant, Quotas

KEY = {"Authorization": "Bearer a long key"}


def test_keys_are_asked_for(serve):
    client = serve(tenants=(Tenant(key="secret-key"),))
    for key in (None, "wrong", "Bearer wrong-key-1", "Basic secret-key"):
        headers = {} if key is None else {"authorization": key}
        refused(client.post(CHAT, json=chat(), headers=headers), 401, "key")
        assert client.get("/metrics", headers=headers).status_code == 401
    good = {"authorization": "Bearer secret-key"}
    assert client.post(CHAT, json=chat(), headers=good).status_code == 200
    for open_to_all in ("/", "/health", "/ready"):
        assert client.get(open_to_all).status_code == 200


def test_a_key_may_have_any_letters(serve):
    client = serve(tenants=(Tenant("a", "schlüssel-von-a"),))
    headers = {"authorization": "Bearer schlüssel-von-a".encode()}
    assert client.get("/v1/models", headers=headers).status_code == 200


def cached(client, headers=None, **more) -> list[str]:
    answer = client.post(CHAT, json=chat(**more), headers=headers or {}).json()
    return [chunk["cached"] for chunk in answer["blocktune"]["chunks"]]


def test_tenants_and_salts_share_no_chunks(serve, engine):
    engine.forget()
    client = serve(tenants=(Tenant("a", "key-of-a"), Tenant("b", "key-of-b")))
    a, b = ({"authorization": f"Bearer key-of-{name}"} for name in "ab")
    assert cached(client, a) == ["none"] * 3
    assert cached(client, a) == ["memory"] * 3
    assert cached(client, b) == ["none"] * 3
    assert cached(client, a, cache_salt="x") == ["none"] * 3
    assert cached(client, a, cache_salt="x") == ["memory"] * 3
    own = client.post("/v1/chunks", json={"documents": DOCUMENTS}, headers=a).json()
    key = own["data"][0]["key"]
    assert client.get(f"/v1/chunks/{key}", headers=a).json()["cached"] == "stored"
    refused(client.get(f"/v1/chunks/{key}", headers=b), 404)
    refused(client.delete(f"/v1/chunks/{key}", headers=b), 404)
    refused(client.delete(f"/v1/chunks/{key[:64]}", headers=b), 404)


def test_made_up_salts_leave_little_behind(client, engine, monkeypatch):
    """Clients may send a new salt with every request."""
    from blocktune.cache import prefix_tree
    from blocktune.cache.store import chunk_store

    monkeypatch.setattr(chunk_store, "_NOTED", 3)
    monkeypatch.setattr(chunk_store, "_TENANTS", 3)
    monkeypatch.setattr(prefix_tree, "_TENANTS", 3)
    tree = engine.state.prefix_tree
    held = engine.store._tenants_notes, engine.store._shared_ropes, tree._listed
    before = [max(3, len(one)) for one in held]
    for index in range(6):
        for method in ("cache-craft", "fusionrag", "prefix-cache"):
            body = chat(cache_salt=f"salt {index}", blocktune={"method": method})
            response = client.post(CHAT, json=body)
            assert response.status_code == 200, response.text
    assert held[0]
    assert all(len(one) <= most for one, most in zip(held, before, strict=True))
    assert engine.store.memoized("x", dict) is engine.store.memoized("x", dict)


def test_exact_prefixes_are_not_shared_either(client, engine):
    engine.forget()
    body = chat(blocktune={"method": "prefix-cache"})

    def hits(**more) -> int:
        usage = client.post(CHAT, json=body | more).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"]

    assert hits() == 0 < hits()
    assert hits(cache_salt="x") == 0 < hits(cache_salt="x")


def test_tenants_are_read_from_a_file(tmp_path):
    path = tmp_path / "tenants.yaml"
    path.write_text("acme: {key: 12345678, tokens_per_minute: 100}\n")
    with pytest.raises(ValueError, match="key"):
        load_tenants(path)
    path.write_text("acme: {key: 'key-of-acme', tokens_per_minute: 100}\n")
    assert load_tenants(path) == (Tenant("acme", "key-of-acme", None, 100),)
    path.write_text("a: {key: 'key-of-acme '}\n")
    with pytest.raises(ValueError, match="white space"):
        load_tenants(path)
    path.write_text("a: {key: 'the-same-key'}\nb: {key: 'the-same-key'}\n")
    with pytest.raises(ValueError, match="same key"):
        load_tenants(path)
    path.write_text("a: {key: 'key-of-acme', max_request: 2}\n")
    with pytest.raises(ValueError, match="max_request"):
        load_tenants(path)
    # who has another's name would share its chunks and quota
    path.write_text("1: {key: 'key-of-acme'}\n'1': {key: 'key-of-other'}\n")
    with pytest.raises(ValueError, match="tenants '1' is given 2 times"):
        load_tenants(path)
    path.write_text("a: {key: 'key-of-acme'}\nb: {key: 'key-of-other', name: a}\n")
    with pytest.raises(ValueError, match="tenant 'b' has its name twice"):
        load_tenants(path)


def test_quotas():
    quotas = Quotas()
    tenant = Tenant("a", None, max_requests=1, tokens_per_minute=600)
    assert quotas.enter(tenant, 500) is None
    assert quotas.enter(tenant, 1) == 1.0
    quotas.leave(tenant)
    wait = quotas.enter(tenant, 200)
    assert 9 <= wait <= 10
    small = Tenant("b", None, tokens_per_minute=60)
    assert quotas.enter(small, 600) is None  # more than fits: it waits for a full quota only
    assert 599 <= quotas.enter(small, 600) <= 600


def test_a_quota_is_answered_429(serve):
    client = serve(tenants=(Tenant("a", "key-of-a", tokens_per_minute=100),))
    headers = {"authorization": "Bearer key-of-a"}
    assert client.post(CHAT, json=chat(), headers=headers).status_code == 200
    late = client.post(CHAT, json=chat(), headers=headers)
    refused(late, 429, "quota")
    assert int(late.headers["retry-after"]) >= 1
    ahead = client.post("/v1/chunks", json={"documents": DOCUMENTS}, headers=headers)
    refused(ahead, 429, "quota")


def test_tokens_that_an_answer_did_not_have_are_given_back(serve):
    client = serve(tenants=(Tenant("a", "key-of-a", tokens_per_minute=600),))
    for stream in (False, True, False):
        body = chat(max_tokens=300, stream=stream)
        answer = client.post(CHAT, json=body, headers={"authorization": "Bearer key-of-a"})
        assert answer.status_code == 200, answer.text


def test_an_answer_that_fails_costs_its_prompt_alone(serve, monkeypatch):
    def fail(*args):
        raise RuntimeError("no memory")

    client = serve(tenants=(Tenant("a", "key-of-a", tokens_per_minute=600),))
    headers = {"authorization": "Bearer key-of-a"}
    with monkeypatch.context() as patch:
        patch.setattr("blocktune.server.scheduler.prefill_batch", fail)
        for _ in range(2):
            refused(client.post(CHAT, json=chat(max_tokens=300), headers=headers), 500)
    assert client.post(CHAT, json=chat(max_tokens=300), headers=headers).status_code == 200


def test_token_ids_of_another_ones_texts_are_not_remembered(client, engine, monkeypatch):
    """Else who sends a text could tell by the time whether somebody had sent it before."""
    read, kind = [], type(engine.tokenizer)
    real = kind.__call__

    def seen(self, text, **options):
        read.append(text)
        return real(self, text, **options)

    monkeypatch.setattr(kind, "__call__", seen)
    for salt in ("one", "other", "one"):
        client.post(CHAT, json=chat(documents=["The harbour was moved."], cache_salt=salt))
    assert sum("The harbour was moved." in text for text in read) == 2


def test_the_one_key_uses_what_was_encoded_before(tmp_path):
    """`blocktune encode` knows no tenants."""
    engine = Engine.from_pretrained(str(TINY), store=tmp_path, device="cpu")
    texts = ["Anna Belt is in Kirby.", "Walter Gray lives in Upper Lorne."]
    engine.encode(texts)
    for tenant, hits in ((OnlyTenant(key="a long key"), 2), (Tenant("acme", "a long key"), 0)):
        service = Service({"tiny": engine}, ServerConfig(tenants=(tenant,)), None, checked=False)
        with TestClient(create_app(service), "http://localhost") as client:
            body = chat(documents=texts)
            usage = client.post(CHAT, json=body, headers=KEY).json()["blocktune"]["usage"]
            assert usage["chunk_hits"] == hits


def test_a_tenant_has_one_quota_whatever_its_salts(serve, engine, tmp_path):
    store = ChunkStore.open(f"{tmp_path},memory=0")
    own = Engine(engine.model, engine.tokenizer, format=engine.format, store=store)
    client = serve({"tiny": own}, tenants=(Tenant("acme", "a long key"),))
    for number in range(3):
        body = chat(documents=["The same text."], cache_salt=f"salt {number}")
        assert client.post(CHAT, json=body, headers=KEY).status_code == 200
    assert len(Shelf.open(str(tmp_path)).ledger.counts("tenant")) == 1


def test_pins_of_an_earlier_server_count(serve, engine, tmp_path):
    own = Engine(
        engine.model, engine.tokenizer, format=engine.format, store=ChunkStore.open(tmp_path)
    )
    body = {"documents": ["The first text."], "pin": True}
    client = serve({"tiny": own})
    assert client.post("/v1/chunks", json=body).status_code == 200
    held = client.service.scheduler.pinned
    assert held
    again = serve({"tiny": own})
    assert again.service.scheduler.pinned.keys() == held.keys()


def test_a_request_that_is_not_taken_does_not_cost_its_tenants_tokens(serve):
    limits = {"kv_bytes": 2_000_000}
    client = serve(limits=limits, tenants=(Tenant("a", "key-of-a", tokens_per_minute=3000),))
    headers = {"authorization": "Bearer key-of-a"}
    for _ in range(3):  # the first would leave nothing for the others
        large = client.post(CHAT, json=chat(max_tokens=2800), headers=headers)
        refused(large, 400, "keys and values")
    assert client.post(CHAT, json=chat(), headers=headers).status_code == 200


def test_what_waits_for_a_remote_is_written_before_the_end(engine, tmp_path, monkeypatch):
    write = FsspecBlobs._write
    monkeypatch.setattr(FsspecBlobs, "_write", lambda *file: time.sleep(0.1) or write(*file))
    url = f"file://{tmp_path / 'remote'}"
    own = Engine(engine.model, engine.tokenizer, format=engine.format, store=ChunkStore.open(url))
    service = Service({"tiny": own}, ServerConfig(), None, checked=False)
    with TestClient(create_app(service), "http://localhost") as client:
        made = client.post("/v1/chunks", json={"documents": DOCUMENTS}).json()["data"]
    other = ChunkStore.open(url)
    assert [chunk["key"] in other for chunk in made] == [True] * 3


def test_other_requests_do_not_wait_for_a_slow_remote(serve, engine, monkeypatch):
    """Whether it has a chunk is asked outside of the thread that serves all connections."""
    client = serve()
    key = client.post("/v1/chunks", json={"documents": DOCUMENTS}).json()["data"][0]["key"]
    real = ChunkStore.__contains__
    asked = threading.Event()

    def slow(self, key):
        asked.set()
        return health.wait(30) and real(self, key)

    health = threading.Event()
    monkeypatch.setattr(ChunkStore, "__contains__", slow)
    for method in ("GET", "DELETE"):
        asked.clear()
        health.clear()
        with ThreadPoolExecutor(1) as pool:
            looking = pool.submit(client.request, method, f"/v1/chunks/{key}")
            assert asked.wait(30)
            assert client.get("/health").status_code == 200
            assert not looking.done()
            health.set()
            assert looking.result().status_code == 200
