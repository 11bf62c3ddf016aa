"""The server as users start it: two ranks, a LoRA adapter, an encoder beside it."""

import asyncio
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx
import openai
import pytest
from vllm_cases import TINY, questions

from blocktune.cache.store.shelf import MissQueue

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def engines(serving):
    return serving.engines


@pytest.fixture(scope="module")
def server(serving):
    return serving.url()


def body(example, model=TINY, **more):
    documents = [{"title": one.title, "text": one.text} for one in example.chunks]
    message = {"role": "user", "content": example.question}
    chat = {"model": model, "messages": [message], "temperature": 0, "max_tokens": 12}
    return chat | {"documents": documents} | more


def ask(server, example, model=TINY, **more):
    return httpx.post(
        f"{server}/v1/chat/completions", json=body(example, model, **more), timeout=120
    )


def text_of(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"].strip()


@pytest.mark.parametrize("model", [TINY, "tuned"])
def test_answers_are_the_engines(server, engines, model):
    examples = questions(31)
    method = "naive" if model == TINY else "block-attention"
    wanted = engines[model].answer(examples, method, max_new_tokens=12)
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda one: ask(server, one, model), examples))
    assert [text_of(one) for one in made] == [one.text for one in wanted]
    for one in made:
        usage = one.json()["usage"]
        cached = usage["prompt_tokens_details"]["cached_tokens"]
        assert 0.7 * usage["prompt_tokens"] < cached < usage["prompt_tokens"]


def test_each_name_of_the_model_answers(server, engines):
    example = questions(31)[0]
    [wanted] = engines[TINY].answer([example], max_new_tokens=12)
    assert text_of(ask(server, example, "alias")) == wanted.text


def test_an_adapter_that_only_encodes_answers_without_documents(server):
    example = questions(31)[0]
    bare = body(example, "packet")
    del bare["documents"]
    url = f"{server}/v1/chat/completions"
    made = [httpx.post(url, json=bare | {"model": name}, timeout=120) for name in ("packet", TINY)]
    assert text_of(made[0]) == text_of(made[1])


def test_without_a_model_the_first_adapter_answers(server):
    bare = {key: value for key, value in body(questions(31)[0]).items() if key != "documents"}
    for more in ({}, {"model": None}):
        asked = bare | more if more else {key: bare[key] for key in bare if key != "model"}
        made = httpx.post(f"{server}/v1/chat/completions", json=asked, timeout=120)
        assert made.json()["model"] == "tuned", made.text


def test_documents_may_follow_the_question(server):
    example = questions(31)[0]
    blocks = [
        {"type": "document", "title": one.title, "source": {"type": "text", "data": one.text}}
        for one in example.chunks
    ]
    messages = [{"role": "user", "content": text} for text in (example.question, blocks)]
    asked = {"model": TINY, "messages": messages, "temperature": 0, "max_tokens": 12}
    made = httpx.post(f"{server}/v1/chat/completions", json=asked, timeout=120)
    assert made.json()["usage"]["prompt_tokens_details"]["cached_tokens"], made.text


@pytest.mark.parametrize(
    ("path", "more"),
    [
        ("completions", {"prompt": "x"}),
        ("responses", {"input": "x"}),
        ("chat/completions/batch", {"messages": [[{"role": "user", "content": "x"}]]}),
        ("messages", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4}),
        ("messages/count_tokens", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
def test_documents_are_not_ignored_on_other_routes(server, path, more):
    made = httpx.post(
        f"{server}/v1/{path}", json={"model": TINY, "documents": [{"text": "x"}]} | more
    )
    assert made.status_code == 400, made.text
    assert "documents is read by /v1/chat/completions only" in made.text


def test_openais_client_streams(server, engines):
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none")
    example = questions(31)[0]
    asked = body(example)
    documents = {"documents": asked.pop("documents"), "blocktune": {"method": "link0"}}
    engines[TINY].answer([example], "link0")
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}, extra_body=documents
    )
    pieces = list(stream)
    said = "".join(one.choices[0].delta.content or "" for one in pieces if one.choices)
    [wanted] = engines[TINY].answer([example], "link0", max_new_tokens=12)
    assert said.strip() == wanted.text
    assert pieces[-1].usage.prompt_tokens_details.cached_tokens > 0


def test_an_answer_that_was_broken_off_can_be_asked_again(server, engines):
    example = questions(31)[1]
    asked = body(example, stream=True, ignore_eos=True, max_tokens=400)
    with httpx.stream("POST", f"{server}/v1/chat/completions", json=asked, timeout=60) as stream:
        next(stream.iter_lines())
    [wanted] = engines[TINY].answer([example], max_new_tokens=12)
    assert text_of(ask(server, example)) == wanted.text


def test_a_request_without_documents_is_vllms(server):
    message = {"role": "user", "content": "Where is Anna?"}
    asked = {"model": TINY, "messages": [message], "max_tokens": 4, "temperature": 0}
    asked["prompt_logprobs"] = 1
    made = httpx.post(f"{server}/v1/chat/completions", json=asked, timeout=60)
    assert made.status_code == 200
    assert made.json()["prompt_logprobs"]


@pytest.mark.parametrize(
    ("more", "status", "reason"),
    [
        ({"prompt_logprobs": 1}, 400, "prompt_logprobs is not supported with documents"),
        ({"use_beam_search": True, "n": 2}, 400, "use_beam_search is not supported"),
        ({"chat_template_kwargs": {"x": 1}}, 400, "chat_template_kwargs is not supported"),
        ({"add_generation_prompt": False}, 400, "add_generation_prompt: false is not"),
        ({"kv_transfer_params": {"x": 1}}, 400, "kv_transfer_params is not supported"),
        ({"blocktune": {"method": "cacheblend"}}, 400, "vLLM cannot serve 'cacheblend'"),
        ({"blocktune": {"method": "kv-packet"}}, 400, "needs an adapter"),
        ({"blocktune": {"method": "link0", "params": {"blanks": "x"}}}, 400, "blanks"),
        ({"blocktune": {"strange": 1}}, 400, "strange"),
        ({"blocktune": {"strip": True}}, 400, "blocktune.strip is not supported"),
        ({"model": "other"}, 404, "no model 'other'"),
        ({"documents": ["x " * 2000]}, 400, "maximum context length is"),
        ({"documents": ["x", " "]}, 400, "documents[1]"),
        ({"documents": ["x", {"id": "y", "data": {"title": None}}]}, 400, "documents[1]"),
        ({"documents": "x"}, 400, "documents: Input should be a valid list"),
        ({"documents": None, "document": ["x"]}, 400, "did you mean 'documents'"),
        ({"documents": None, "chunks": ["x"]}, 400, "chunks is not supported; send them as"),
        ({"max_tokens": 1000}, 400, "context"),
        ({"cache_salt": "blocktune:x"}, 400, "cache_salt must not start with 'blocktune:'"),
        ({"stop_token_ids": 7}, 400, "stop_token_ids"),
        ({"stop_token_ids": ["x"]}, 400, "stop_token_ids"),
        ({"messages": 5}, 400, "messages"),
    ],
)
def test_mistakes_are_one_line(server, more, status, reason):
    made = ask(server, questions(31)[0], **more)
    assert made.status_code == status, made.text
    assert reason in made.text
    assert r"\n" not in made.text


def test_null_is_as_if_left_out(server, engines):
    example = questions(31)[0]
    nulls = dict.fromkeys(("blocktune", "stop_token_ids", "max_completion_tokens"))
    [wanted] = engines[TINY].answer([example], max_new_tokens=12)
    assert text_of(ask(server, example, **nulls)) == wanted.text


def test_a_request_that_is_nested_too_deeply_is_refused(server):
    deep = b'{"documents":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    sent = {"content": deep, "headers": {"Content-Type": "application/json"}}
    made = httpx.post(f"{server}/v1/chat/completions", **sent, timeout=60)
    assert made.status_code == 400, made.text


def test_raw_requests_are_guarded_too(server):
    plan = {"blocktune": {"fingerprint": "0" * 64, "segments": [2]}}
    asked = {"model": TINY, "prompt": [5, 6, 7, 8], "max_tokens": 2, "kv_transfer_params": plan}
    url = f"{server}/v1/completions"
    refused = httpx.post(url, json=asked | {"prompt_logprobs": 1}, timeout=60)
    assert refused.status_code == 400
    assert "prompt_logprobs cannot" in refused.text
    refused = httpx.post(url, json=asked | {"use_beam_search": True, "n": 2}, timeout=60)
    assert refused.status_code == 400
    assert "use_beam_search excludes" in refused.text
    refused = httpx.post(url, json=asked, timeout=60)
    assert refused.status_code == 400
    assert "has no model of fingerprint 0000" in refused.text
    plan["blocktune"]["segments"] = [9]
    refused = httpx.post(url, json=asked, timeout=60)
    assert refused.status_code == 400
    assert "its ids are 4" in refused.text


def test_missing_chunks_are_encoded_by_a_follower(server, serving):
    example = questions(32, 1)[0]
    command = [sys.executable, "-m", "blocktune.cli", "encode", "--follow", "--store"]
    command += [str(serving.store), "--model", TINY, "--dtype", "float32", "--device", "cpu"]
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(ask, server, example)
        encoder = subprocess.Popen(command, cwd=ROOT, env=serving.env, stdout=subprocess.PIPE)
        try:
            made = text_of(waiting.result(130))
        finally:
            encoder.terminate()
            encoder.wait()
    [wanted] = serving.engines[TINY].answer([example], max_new_tokens=12)
    assert made == wanted.text


def test_a_client_that_leaves_takes_its_chunks_out_of_the_queue(server, serving):
    queue, fingerprint = MissQueue(serving.store), serving.engines[TINY].fingerprint
    with sent(server, body(questions(33, 1)[0])):
        until(lambda: queue.take(fingerprint))
    until(lambda: not queue.take(fingerprint))


def test_an_answer_whose_client_has_left_ends(server, engines):
    example = questions(1, 1)[0]
    engines[TINY].encode(example.chunks)
    length = 800
    before = metric(server, "generation_tokens_total")
    with sent(server, body(example, max_tokens=length, ignore_eos=True)):
        until(lambda: metric(server, "num_requests_running"))
    until(lambda: not metric(server, "num_requests_running"))
    assert metric(server, "generation_tokens_total") - before < length


def metric(server, name) -> float:
    lines = httpx.get(f"{server}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))


@contextmanager
def sent(server, body):
    """A connection that has sent a request; it is closed at the end, without having read."""
    address = httpx.URL(server)
    request = httpx.Request("POST", f"{server}/v1/chat/completions", json=body)
    head = "".join(f"{name}: {value}\r\n" for name, value in request.headers.items())
    with socket.create_connection((address.host, address.port)) as connection:
        text = f"POST {request.url.path} HTTP/1.1\r\n{head}\r\n"
        connection.sendall(text.encode() + request.content)
        yield connection


def until(condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_remote_alone_is_not_waited_for():
    """It has no queue, so nothing encodes what it lacks."""
    from blocktune.vllm.route import HTTPException, Renderer

    store = SimpleNamespace(queue=SimpleNamespace(folder=None))
    client = SimpleNamespace(store=store, missing=lambda _: ["x"], ask_for=lambda _: None)
    with pytest.raises(HTTPException, match="not encoded yet: 1") as error:
        asyncio.run(Renderer({}, "", 1e9)._encoded(client, SimpleNamespace(plan=None)))
    assert error.value.status_code == 503


def test_metrics_count_what_was_loaded(server):
    text = httpx.get(f"{server}/metrics").text
    for name in (
        "vllm:blocktune_loads",
        "vllm:blocktune_tokens",
        "vllm:external_prefix_cache_hits",
    ):
        line = next(one for one in text.splitlines() if one.startswith(f"{name}_total"))
        assert float(line.split()[-1]) > 0
