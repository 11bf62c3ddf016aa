"""`blocktune serve` as a process: clients, streams, a client that leaves, SIGTERM."""

import json
import signal
import socket
import threading
import time
from contextlib import suppress

import httpx
import pytest
from openai import NotFoundError, OpenAI
from server.support import CHAT, DOCUMENTS, QUESTION, chat, metric, process, refused

LONG = {"max_tokens": 2000, "temperature": 100, "seed": 5}
"""Nearly uniform draws: the end of turn is one token of a thousand."""


@pytest.fixture(scope="module")
def server():
    with process() as (client, _):
        yield client


def lines_of(response) -> list[dict]:
    read = (line.removeprefix("data: ") for line in response.iter_lines() if line[:1] == "d")
    return [json.loads(line) for line in read if line != "[DONE]"]


def test_an_answer_is_read_while_it_is_written(server):
    with server.stream("POST", CHAT, json=chat(stream=True) | LONG) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = response.iter_lines()  # held: without it the client closes the connection
        assert next(lines).startswith("data: ")
        assert metric(server.get("/metrics").text, "num_requests_running") == 1


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
    for _ in range(1500):
        if holds(metric(server.get("/metrics").text, name)):
            return
        time.sleep(0.02)
    raise AssertionError(f"{name} did not get there")


def test_sigterm_loses_no_accepted_request():
    with process("--limit", "running=4") as (client, running):  # the others wait
        done = []

        def ask(stream: bool) -> None:
            body = chat("Go on.", stream=stream, n=2) | LONG | {"max_tokens": 60}
            with client.stream("POST", CHAT, json=body) as response:
                response.read()
                done.append((response.status_code, response.text))

        threads = [threading.Thread(target=ask, args=(i % 2 == 0,)) for i in range(6)]
        for thread in threads:
            thread.start()
        until(client, "num_requests_waiting", lambda value: value >= 3)
        running.terminate()
        for thread in threads:
            thread.join()
        assert running.wait(30) in (0, -signal.SIGTERM)
        assert [status for status, _ in done] == [200] * 6
        streamed = [text for _, text in done if text.startswith("data")]
        assert len(streamed) == 3
        assert all(text.endswith("data: [DONE]\n\n") for text in streamed)


def test_a_request_that_does_not_end_in_time_is_told_so():
    with process("--drain-s", "0") as (client, running):
        done = []

        def ask(stream: bool) -> None:
            body = chat("Go on.", stream=stream, n=4) | LONG
            done.append(httpx.post(f"{client.base_url}{CHAT}", json=body, timeout=60))

        asking = [threading.Thread(target=ask, args=(stream,)) for stream in (False, True)]
        for thread in asking:
            thread.start()
        until(client, "num_requests_running", lambda value: value == 8)
        running.terminate()
        for thread in asking:
            thread.join()
        whole, streamed = sorted(done, key=lambda response: -response.status_code)
        refused(whole, 503, "shut down")
        if streamed.status_code == 200:  # not if it had no token yet
            assert "shut down" in lines_of(streamed)[-1]["error"]["message"]
        assert running.wait(30) in (0, -signal.SIGTERM)
        assert "Traceback" not in running.err.read_text()


def test_connections_that_send_no_request_are_closed():
    with process("--limit", "body_s=0.3") as (client, _):
        address = (client.base_url.host, client.base_url.port)
        for head in (b"", b"GET /hea", b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"):
            with socket.create_connection(address) as slow:
                slow.settimeout(10)
                slow.sendall(head)
                while slow.recv(1000):
                    slow.sendall(b"x")  # always a little more, never enough
        asked = b"GET /health HTTP/1.1\r\nhost: localhost\r\n\r\n"
        with socket.create_connection(address) as idle:  # a proxy keeps it for its next request
            for pause in (1.0, 0):
                idle.sendall(asked)
                answer = b""
                while not answer.endswith(b"}"):
                    answer += (part := idle.recv(1000))
                    assert part, "it was closed"
                time.sleep(pause)
        assert client.get("/health").status_code == 200


def test_two_replicas_share_one_store(tmp_path):
    """What one has encoded, the other reads; one killed while it works disturbs neither."""
    store = str(tmp_path / "chunks")

    def ask(client, documents=DOCUMENTS) -> tuple[str, list[str]]:
        made = client.post(CHAT, json=chat(documents=documents)).json()
        tiers = [chunk["cached"] for chunk in made["blocktune"]["chunks"]]
        return made["choices"][0]["message"]["content"], tiers

    with process("--store", store) as (first, _), process("--store", store) as (second, old):
        answer, tiers = ask(first)
        assert tiers == ["none"] * 3
        assert ask(second) == (answer, ["disk"] * 3)
        text = "Anna Belt is in Kirby. " * 50
        documents = [[f"{turn} {n}. {text}" for n in range(10)] for turn in range(300)]
        threading.Thread(target=lambda: ask_until_killed(second, documents)).start()
        until(second, "num_requests_running", lambda value: value > 0)
        old.kill()
        with process("--store", store) as (third, _):
            assert ask(third) == (answer, ["disk"] * 3)
            assert ask(first) == (answer, ["memory"] * 3)
            for some in documents[:1]:
                assert ask(third, some)[0] == ask(first, some)[0]


def ask_until_killed(client, documents: list[list[str]]) -> None:
    """New chunks with every request, so that the server is never idle."""
    with suppress(httpx.HTTPError):
        for some in documents:
            client.post(CHAT, json=chat(documents=some))
