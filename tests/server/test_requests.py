"""Wrong and hostile requests, and what is not done for a request."""

import asyncio
import difflib
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from server.support import CHAT, chat, metric, refused, wait_until

from blocktune.data.example import read_chunk
from blocktune.server import Limits, ServerConfig
from blocktune.server.config import Tenant
from blocktune.server.front import read_documents
from blocktune.server.middleware import Metrics
from blocktune.server.schemas import ChunksRequest, read_body

MESSAGES = [{"role": "user", "content": "Who?"}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function"}]}
TEXT = "Anna Belt is in Kirby."


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": " "}]}, "question"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "I"}]}, "question"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [CALL, *MESSAGES]}, "messages.0: tool_calls is not supported"),
        ({"documents": [{"text": ""}]}, "documents[0]"),
        ({"documents": [{"id": "x"}]}, "documents"),
        ({"documents": [{"type": "document", "source": {"type": "url"}}]}, "documents"),
        (
            {"documents": [{"type": "document", "source": {"type": "base64"}, "text": "x"}]},
            "documents.0.source.type",
        ),
        ({"documents": ["a"] * 300}, "300"),
        ({"documents": ["a"] * 5000}, "documents"),
        ({"documents": ["b" * 2_000_000]}, "characters"),
        ({"documents": ["a " * 40_000]}, "32768"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1 << 70}, "max_tokens"),
        ({"max_tokens": 5000}, "4,096"),
        ({"seed": 1 << 80}, "seed"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice is not supported"),
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"repetition_penalty": 1.1}, "repetition_penalty"),
        ({"stop_token_ids": [3]}, "stop_token_ids"),
        ({"allowed_token_ids": [3]}, "allowed_token_ids"),
        ({"include_stop_str_in_output": True}, "include_stop_str_in_output"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "chat_template_kwargs"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"add_generation_prompt": False}, "add_generation_prompt"),
        ({"guided_choice": ["yes", "no"]}, "guided_choice"),
        ({"top_logprobs": 3}, "top_logprobs needs logprobs"),
        ({"min_p": 0.1}, "min_p"),
        ({"extra_body": {"documents": []}}, "extra_body is not supported; put its fields into"),
        ({"messages": [{"role": "user", "content": " "}]}, "the last message must have the role"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"blocktune": {"methd": "naive"}}, "methd"),
        ({"method": "epic"}, "the field blocktune"),
        ({"blocktune": {"method": "nothing-of-that-name"}}, "nothing-of-that-name"),
        ({"blocktune": {"method": "epic", "params": {"k": 10**30}}}, "1e+09"),
        ({"blocktune": {"method": "epic 99999999999"}}, "1e+09"),
        ({"blocktune": {"method": "epic", "params": {"method": 1}}}, "method"),
        ({"blocktune": {"method": "link0", "params": {"blanks": 10**6}}}, "blanks"),
        ({"blocktune": {"method": "naive + deviation .nan %"}}, "deviation"),
        ({"blocktune": {"method": "kvlink"}}, "adapter"),
        ({"blocktune": {"method": {"preset": "epic", "select": {"x": 1}}}}, "x"),
        ({"blocktune": {"method": "cacheclip auxiliary=/etc/passwd"}}, "auxiliary"),
        ({"blocktune": {"method": "cacheclip auxiliary=gpt2"}}, "auxiliary"),
        ({"blocktune": {"method": "recycle model=/etc"}}, "embedding model"),
        ({"stop": "x" * 300}, "stop"),
        ({"stop": ["x"] * 17}, "16"),
        ({"documents": None, "document": ["Anna Belt is in Kirby."]}, "documents"),
        ({"chunks": ["Anna Belt is in Kirby."]}, "documents"),
        ({"max_tokens": None, "max_token": 5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"max_completion_tokens": "5"}, "max_completion_tokens"),
        ({"temperature": "0.5"}, "temperature"),
        ({"stream": "yes"}, "stream"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "image_url"),
        ({"tools": [[]] * 300_000}, "262,144"),
        ({"model": "../../etc/passwd"}, "tiny"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(client, change, word):
    response = client.post(CHAT, json=chat() | change)
    refused(response, 404 if "model" in change else 400, word)
    assert client.post(CHAT, json=chat()).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"messages": ' + b"[" * 100_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "documents": [{"text": "\\udfff"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "documents": '
        b'[{"text": "b", "id": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "a"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "a"}], "blocktune": {"method": "\\ud800"}}',
        b'{"messages": [{"role": "user", "content": "a"}], "\\ud800": 1, "n": "\\ud800"}',
        b'{"messages": [{"role": "user", "content": "a"}], "cache_salt": "\\ud800"}',
        b'{"model": "\\ud800", "messages": [{"role": "user", "content": "a"}]}',
        b"\xff\xfe",
    ],
)
def test_what_is_not_a_request_is_refused(client, raw):
    response = client.post(CHAT, content=raw, headers={"content-type": "application/json"})
    assert 400 <= response.status_code < 500, response.text
    assert response.json()["error"]["message"]


def test_a_byte_order_mark_is_skipped(client):
    raw = b"\xef\xbb\xbf" + json.dumps(chat(max_tokens=1)).encode()
    headers = {"content-type": "application/json"}
    assert client.post(CHAT, content=raw, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "document",
    [
        {"id": 7, "text": TEXT, "source": "https://a.example"},
        {"id": 7, "data": {"title": "Anna", "snippet": TEXT, "url": "https://a.example"}},
        {"id": 7, "data": {"id": "inner", "text": TEXT}},
        {"id": 7, "data": {"text": TEXT, "year": 1999, "page": None}},
        {"title": "Anna", "snippet": TEXT},
        {"type": "Document", "page_content": TEXT, "metadata": {"id": 7}},
        {"id": 7, "payload": {"text": TEXT}, "score": 0.5},
    ],
)
def test_a_document_is_the_chunk_that_encode_makes_of_it(document):
    """Other fields, too, must mean the same, or what was encoded ahead is not found."""
    [given] = read_body(ChunksRequest, json.dumps({"documents": [document]}).encode(), 99).documents
    [chunk] = read_documents([given])
    assert chunk == read_chunk(document, "chunk")
    assert chunk.metadata.get("id", 7) == 7


def test_special_tokens_and_placeholders_in_texts_stay_text(client):
    texts = ["</s><|user|>", "BlocktuneText0StandsHere", "<|end|> " * 50]
    for text in texts:
        body = chat(f"{text} Who?", [text, {"title": text, "text": text}])
        assert client.post(CHAT, json=body).status_code == 200
    refused(client.post(CHAT, json=chat("BlocktuneChunksStandHere")), 400)


def test_a_form_of_another_site_is_not_read(client):
    """Browsers send text/plain anywhere without asking; JSON they ask for, and are refused."""
    body = json.dumps(chat()).encode()
    plain = client.post(CHAT, content=body, headers={"content-type": "text/plain"})
    refused(plain, 415, "application/json")
    asked = client.options(
        CHAT, headers={"origin": "http://evil", "access-control-request-method": "POST"}
    )
    assert asked.status_code == 405
    assert "access-control-allow-origin" not in asked.headers


def test_other_encodings_and_forms_are_refused(client):
    body = json.dumps(chat()).encode()
    for headers in (
        {"content-type": "application/json; charset=utf-16"},
        {"content-type": "application/json", "content-encoding": "gzip"},
        {"content-type": "multipart/form-data; boundary=x"},
    ):
        refused(client.post(CHAT, content=body, headers=headers), 415)
    for kind in ("Application/JSON; charset=UTF-8", 'application/json; charset="utf-8"; q=1'):
        headers = {"content-type": kind, "content-encoding": "identity"}
        assert client.post(CHAT, content=body, headers=headers).status_code == 200


def test_many_fields_that_no_one_knows_cost_little(client, monkeypatch):
    """Each is compared with the names of fields; 8 MB hold 200,000."""
    compared, real = [], difflib.get_close_matches
    monkeypatch.setattr(
        difflib,
        "get_close_matches",
        lambda *args, **how: compared.append(args) or real(*args, **how),
    )
    strange = {f"strange_{n:05}": 0 for n in range(20_000)}
    body = chat(documents=[{"text": TEXT} | {f"ti{n:04}": 0 for n in range(9999)}])
    assert client.post(CHAT, json=body | strange | {"x" * 1_000_000: 0}).status_code == 200
    assert len(compared) <= 200
    assert all(abs(len(word) - len(name)) <= 1 for word, names, *_ in compared for name in names)


def test_null_is_as_if_left_out(client):
    """Clients send fields that were not set as null."""
    fields = client.get("/openapi.json").json()["components"]["schemas"]["ChatRequest"]
    names = fields["properties"].keys() - fields["required"] - {"documents"}
    nulls = dict.fromkeys([*names, "tool_choice"]) | {"temperature": 0, "max_tokens": 12.0}
    body = chat() | nulls | {"top_k": -1}
    whole = client.post(CHAT, json=body)
    assert whole.status_code == 200, whole.text
    plain = client.post(CHAT, json=chat()).json()
    assert whole.json()["choices"] == plain["choices"]
    method = {"method": None, "params": None, "strip": None}
    more = {"blocktune": method, "stream": True, "stream_options": {"include_usage": None}}
    assert client.post(CHAT, json=chat() | more).status_code == 200


def test_limits_have_units_and_are_in_the_documentation():
    from blocktune.server.config import read_limits

    limits = read_limits(["kv_bytes=8GB", "body_bytes=1000", "running=4"])
    assert (limits.kv_bytes, limits.body_bytes, limits.running) == (8 * 10**9, 1000, 4)
    with pytest.raises(ValueError, match="'kv_bytes' must be a whole number, got 'much'"):
        read_limits(["kv_bytes=much"])
    page = (Path(__file__).parents[2] / "docs/serving.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)`(?:, `body_s`)? \| ([^|]*) \|", page, re.M))
    for name, value in vars(Limits()).items():
        if name.endswith("_bytes"):
            value = f"{value >> 30} GiB" if value >= 1 << 30 else f"{value >> 20} MiB"
        value = f"{value:g}" if isinstance(value, float) else str(value)
        assert value in rows["body_bytes" if name == "body_s" else name].split(", "), name


def test_bodies_that_are_coming_share_a_limit():
    """Many clients that send slowly hold no more than a few bodies."""
    from blocktune.server.middleware import AT_ONCE, Guard

    class Counted:
        def labels(self, *names):
            return self

        def inc(self):
            pass

    config = ServerConfig(limits=Limits(body_bytes=100, body_s=5))
    guard = Guard(None, config=config, metrics=SimpleNamespace(responses=Counted()))
    scope = {"type": "http", "method": "POST", "raw_path": b"/", "headers": [], "client": None}
    coming = {"type": "http.request", "body": b"x" * 90, "more_body": True}

    async def ask(sent: list) -> None:
        parts = [coming]

        async def receive():
            return parts.pop() if parts else await asyncio.Event().wait()

        async def send(message):
            sent.append(message)

        await guard(scope, receive, send)

    async def run() -> list:
        told = [[] for _ in range(AT_ONCE + 4)]
        tasks = [asyncio.create_task(ask(sent)) for sent in told]
        await asyncio.sleep(0.1)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return [sent[0]["status"] for sent in told if sent]

    assert set(asyncio.run(run())) == {429}
    assert guard.held == 0


def test_bodies_have_a_size(serve):
    client = serve(limits={"body_bytes": 1000})
    refused(client.post(CHAT, json=chat("a" * 1000)), 413, "1,000")
    assert client.post(CHAT, json=chat()).status_code == 200


def test_hosts_that_were_not_named_are_refused(serve):
    client = serve(hosts=("localhost",))
    assert client.get("/health").status_code == 200
    refused(client.get("/health", headers={"host": "evil.example"}), 400, "--allowed-host")


@pytest.mark.parametrize(
    ("known", "host", "is_accepted"),
    [
        ("Rag.example", "rag.example:8000", True),
        ("rag.example:8000", "rag.example:8000", True),
        ("rag.example:8000", "rag.example", False),
        ("*.example", "a.example:80", True),
        ("*.example", "example", False),
        ("[::1]", "[::1]:8000", True),
        ("[::1]", "[::1]", True),
        ("*", "", True),
        ("localhost", "", False),
        ("localhost", "localhost.example", False),
    ],
)
def test_hosts_are_named_with_or_without_a_port(known, host, is_accepted):
    assert ServerConfig(hosts=(known,)).accepts(host) == is_accepted


def test_routes_that_do_not_exist_are_named_and_logged(client, caplog):
    with caplog.at_level("INFO", "blocktune.server"):
        refused(client.post("/chat/completions", json=chat()), 404, "/chat/completions", "/v1")
    assert "POST /chat/completions status=404" in caplog.text
    refused(client.get(CHAT), 405, f"GET {CHAT}")


def test_errors_have_the_codes_that_clients_know(client, serve):
    def code(client, **more) -> str:
        return client.post(CHAT, json=chat(**more)).json()["error"]["code"]

    assert code(client, documents=["a " * 40_000]) == "context_length_exceeded"
    assert code(client, model="other") == "model_not_found"
    assert code(client, n=0) is None
    assert code(serve(tenants=(Tenant("a", "a long key"),))) == "invalid_api_key"


def test_health_answers_head(client):
    assert client.head("/health").status_code == 200
    assert client.head("/v1/other").status_code == 404


def test_a_stream_without_news_goes_on_with_comments(client, monkeypatch):
    from blocktune.server import exchange

    monkeypatch.setattr(exchange, "BEAT_S", 1e-4)
    whole = client.post(CHAT, json=chat()).json()  # and chunks, which are not streamed
    assert client.post("/v1/chunks", json={"documents": ["A new one."]}).json()["data"]
    made = client.post(CHAT, json=chat(stream=True))
    assert made.headers["x-accel-buffering"] == "no"
    lines = made.text.split("\n\n")
    assert ": waiting" in lines
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    text = "".join(part["choices"][0]["delta"].get("content", "") for part in parts)
    assert text == whole["choices"][0]["message"]["content"]


def test_streamed_choices_have_their_own_texts_and_log_probabilities(client):
    body = chat(n=3, temperature=3.0, seed=7, logprobs=True, top_logprobs=2)
    whole = client.post(CHAT, json=body).json()["choices"]
    lines = client.post(CHAT, json=body | {"stream": True}).text.split("\n\n")
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    for index, one in enumerate(whole):
        own = [c for part in parts for c in part["choices"] if c["index"] == index]
        text = "".join(c["delta"].get("content", "") for c in own)
        assert text == one["message"]["content"]
        assert own[-1]["finish_reason"] == one["finish_reason"]
        logs = [log["token"] for c in own if c["logprobs"] for log in c["logprobs"]["content"]]
        assert logs == [log["token"] for log in one["logprobs"]["content"]]


def test_ready_means_that_the_check_passed(serve, monkeypatch):
    client = serve(checked=True)
    wait_until(lambda: client.get("/ready").status_code == 200)

    from blocktune.check.serving import Check
    from blocktune.server import service

    broken = [Check("split = dense mask", False, 1.0, 0.1)]
    monkeypatch.setattr(service, "check_model", lambda engine: broken)
    client = serve(checked=True)
    wait_until(lambda: client.service.faults)
    response = client.get("/ready")
    assert response.status_code == 503
    refused(response, 503, "split = dense mask")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_health_ends_with_the_device_or_the_thread(serve, monkeypatch):
    from blocktune.server import scheduler

    def fails(*args, **options):
        raise RuntimeError("device-side assert triggered")

    client = serve()
    monkeypatch.setattr(scheduler, "decode_step", fails)
    assert client.post(CHAT, json=chat()).status_code == 500
    assert client.get("/health").status_code == 200  # a fault of one request
    monkeypatch.setattr(scheduler.Stopwatch, "start", fails)
    assert client.post(CHAT, json=chat()).status_code == 500
    for route in ("/health", "/ready"):
        refused(client.get(route), 503, "the device is lost: device-side assert")
    monkeypatch.undo()
    refused(client.post(CHAT, json=chat()), 429, "the device is lost")
    ended = scheduler.Scheduler(Limits(), before=sys.exit)
    ended.start()
    wait_until(lambda: ended.fault == "the engine's thread has ended")


def test_texts_are_not_logged_unless_asked(serve, caplog):
    caplog.set_level("DEBUG", "blocktune")
    text = serve().post(CHAT, json=chat("Where is Zanzibar?")).json()
    answer = text["choices"][0]["message"]["content"]
    assert "tenant=default" in caplog.text
    for secret in ("Zanzibar", "Kirby", answer):
        assert secret not in caplog.text
    serve(log_texts=True).post(CHAT, json=chat("Where is Zanzibar?"))
    assert answer in caplog.text


def test_metrics_count(serve, engine):
    engine.forget()
    client = serve()
    client.post(CHAT, json=chat())
    client.post(CHAT, json=chat())
    text = client.get("/metrics").text
    assert metric(text, 'chunk_cache_hits_total{tier="memory"}') >= 3
    assert metric(text, "time_to_first_token_seconds_count") == 2
    assert metric(text, "generation_tokens_total") >= 2


def test_the_time_between_tokens_does_not_depend_on_the_number_of_choices(serve, monkeypatch):
    """Choices are decoded together: each step gives all of them a token."""
    record, reports = Metrics.record, []

    def seen(metrics, labels, report, total_s):
        reports.append(total_s - report.ttft_s)
        record(metrics, labels, report, total_s)

    monkeypatch.setattr(Metrics, "record", seen)
    client = serve()
    body = chat(n=8, temperature=100, seed=5, logprobs=True)
    choices = client.post(CHAT, json=body).json()["choices"]
    longest = max(len(choice["logprobs"]["content"]) for choice in choices)
    between_s = metric(client.get("/metrics").text, "inter_token_latency_seconds_sum")
    assert between_s == pytest.approx(reports[0] / (longest - 1))
