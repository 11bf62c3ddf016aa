"""Whole answers from `--response-cache`: the same to the client, and to nobody else."""

import pytest
from minilm import model_folder
from server.support import chat, metric
from starlette.testclient import TestClient

from blocktune.cache import ChunkStore
from blocktune.cache.responses import ResponseCache
from blocktune.engine import Engine
from blocktune.server import ServerConfig, Service, Tenant, create_app

MODEL = model_folder()
QUESTION = "Who directed the film Frozen Shore?"
SIMILAR = "Who was the director of the film Frozen Shore?"


@pytest.fixture
def start(engine):
    clients = []

    def started(threshold=None, **config) -> TestClient:
        store = ChunkStore()
        own = Engine(engine.model, engine.tokenizer, format=engine.format, store=store)
        responses = ResponseCache(store, threshold, MODEL)
        service = Service({"tiny": own}, ServerConfig(**config), None, False, responses)
        client = TestClient(create_app(service), "http://localhost")
        client.__enter__()
        clients.append(client)
        return client

    yield started
    for client in clients:
        client.__exit__(None, None, None)


def ask(client, question=QUESTION, key=None, **more):
    headers = {"authorization": f"Bearer {key}"} if key else {}
    body = chat(question, **{"max_tokens": 6} | more)
    response = client.post("/v1/chat/completions", json=body, headers=headers)
    assert response.status_code == 200, response.text
    return response


def recalled(response):
    return response.json()["blocktune"]["usage"]["recalled"]


def test_the_second_request_gets_the_first_answer(start):
    client = start()
    first, second = ask(client), ask(client)
    assert (recalled(first), recalled(second)) == (None, 1.0)
    for name in ("choices", "usage"):
        one, other = first.json()[name], second.json()[name]
        if name == "usage":
            assert other["completion_tokens"] == one["completion_tokens"]
            assert other["prompt_tokens"] == one["prompt_tokens"]
        else:
            assert other == one
    streamed = ask(client, stream=True).text
    text = first.json()["choices"][0]["message"]["content"]
    assert text in streamed
    assert streamed.endswith("data: [DONE]\n\n")


def test_a_recalled_answer_is_not_counted_as_computed(start):
    client = start()
    ask(client)
    before = client.get("/metrics").text
    answer = ask(client).json()
    after = client.get("/metrics").text
    for name in ('prompt_tokens_total{source="computed"}', "inter_token_latency_seconds_count"):
        assert metric(after, name) == metric(before, name)
    usage = answer["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]


def test_a_streamed_answer_is_kept_as_well(start):
    client = start()
    ask(client, stream=True)
    assert recalled(ask(client)) == 1.0


@pytest.mark.parametrize(
    "more",
    [
        {"max_tokens": 5},
        {"stop": ["the"]},
        {"temperature": 0.7, "seed": 0},
        {"blocktune": {"method": "epic"}},
        {"cache_salt": "other"},
        {"documents": ["Another passage."]},
        {"n": 2},
        {"logprobs": True},
        {"blocktune": {"strip": True}},
        {"question": SIMILAR},
    ],
    ids=str,
)
def test_what_decides_the_answer_separates_requests(start, more):
    client = start()
    ask(client)
    assert recalled(ask(client, **more)) is None
    assert recalled(ask(client)) == 1.0


def test_drawn_answers_need_a_seed(start):
    client = start()
    assert [recalled(ask(client, temperature=0.7)) for _ in "ab"] == [None, None]
    assert [recalled(ask(client, temperature=0.7, seed=0)) for _ in "ab"] == [None, 1.0]


def test_tenants_never_share_an_answer(start):
    tenants = tuple(Tenant(name, f"{name}-secret") for name in ("acme", "zenith"))
    client = start(0.5, tenants=tenants)
    keys = [tenant.key for tenant in tenants]
    assert [recalled(ask(client, key=key)) for key in (*keys, *keys)] == [None, None, 1.0, 1.0]
    assert recalled(ask(client, SIMILAR, key=keys[0], cache_salt="x")) is None


def test_similar_questions_over_the_same_documents(start):
    client = start(0.8)
    first, near = ask(client), ask(client, SIMILAR)
    assert 0.8 <= recalled(near) < 1
    assert near.json()["choices"] == first.json()["choices"]
    assert recalled(ask(client, SIMILAR, documents=["Another passage."])) is None
    assert recalled(ask(client, "What is the capital of France?")) is None


def test_completions_are_kept_too(start):
    client = start()
    body = {"prompt": "Noel Fisher directed", "max_tokens": 4}
    first, second = (client.post("/v1/completions", json=body).json() for _ in "ab")
    assert second["blocktune"]["usage"]["recalled"] == 1.0
    assert second["choices"] == first["choices"]
