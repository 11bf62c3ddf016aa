"""`blocktune serve` as a process: clients, streams, a client that leaves, SIGTERM."""

import json
import re
import runpy
import signal
import socket
import threading
import time

import pytest
from openai import NotFoundError, OpenAI
from server.support import DOCUMENTS, QUESTION, ROOT, chat, metric, process

CHAT = "/v1/chat/completions"
LONG = {"max_tokens": 2000, "temperature": 100, "seed": 5}
"""Nearly uniform draws: the end of turn is one token of a thousand."""


@pytest.fixture(scope="module")
def server():
    with process() as (client, _, _):
        yield client


def lines_of(response) -> list[dict]:
    read = (line.removeprefix("data: ") for line in response.iter_lines() if line)
    return [json.loads(line) for line in read if line != "[DONE]"]


def test_streams_come_in_pieces(server):
    body = chat(stream=True, logprobs=True, temperature=1.5, seed=2, max_tokens=40)
    with server.stream("POST", CHAT, json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        arrived = [time.perf_counter() for _ in response.iter_lines()]
    assert arrived[-1] - arrived[0] > 0.005


def test_the_openai_client_works_unchanged(server):
    client = OpenAI(base_url=f"{server.base_url}/v1", api_key="none")
    assert [model.id for model in client.models.list()] == ["tiny"]
    asked = {
        "model": "tiny",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_completion_tokens": 12,
        "extra_body": {"documents": DOCUMENTS, "blocktune": {"method": "epic"}},
    }
    whole = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    assert whole.usage.prompt_tokens_details.cached_tokens >= 0
    assert whole.choices[0].logprobs.content[0].top_logprobs
    assert whole.model_extra["blocktune"]["method"] == "epic"
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    parts = list(stream)
    text = "".join(part.choices[0].delta.content or "" for part in parts if part.choices)
    assert text == whole.choices[0].message.content
    assert parts[-1].usage.completion_tokens == whole.usage.completion_tokens
    plain = client.completions.create(model="tiny", prompt="The city of", max_tokens=4)
    assert plain.choices[0].text
    with pytest.raises(NotFoundError):
        client.chat.completions.create(**asked | {"model": "gpt-4"})


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_stops_its_answer(server, stream):
    host, port = server.base_url.host, server.base_url.port
    body = json.dumps(chat("Go on and on.", stream=stream, n=8) | LONG).encode()
    with socket.create_connection((host, port)) as left:
        left.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\ncontent-length: %d\r\n\r\n" % len(body) + body
        )
        until(server, "num_requests_running", lambda value: value > 0)
    until(server, "num_requests_running", lambda value: value == 0)
    assert metric(server.get("/metrics").text, "kv_bytes") == 0


def until(server, name: str, holds) -> None:
    for _ in range(200):
        if holds(metric(server.get("/metrics").text, name)):
            return
        time.sleep(0.02)
    raise AssertionError(f"{name} did not get there")


def test_sigterm_loses_no_accepted_request():
    with process() as (client, running, _):
        done = []

        def ask(stream: bool) -> None:
            body = chat("Go on.", stream=stream, n=2) | LONG | {"max_tokens": 150}
            with client.stream("POST", CHAT, json=body) as response:
                response.read()
                done.append((response.status_code, response.text))

        threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(6)]
        for thread in threads:
            thread.start()
        until(client, "num_requests_running", lambda value: value >= 6)
        running.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert running.wait(30) in (0, -signal.SIGTERM)
        assert [status for status, _ in done] == [200] * 6
        streamed = [text for _, text in done if text.startswith("data")]
        assert len(streamed) == 3
        assert all(text.endswith("data: [DONE]\n\n") for text in streamed)


def test_the_example_asks_a_folder_of_markdown(server, capsys):
    example = runpy.run_path(str(ROOT / "examples/serve_rag.py"))
    for _ in range(2):
        example["main"](str(ROOT / "docs"), "What is a chunk?", f"{server.base_url}/v1", 2)
    cached = [int(n) for n in re.findall(r"^(\d+) prompt tokens", capsys.readouterr().out, re.M)]
    assert cached[1] > cached[0]
