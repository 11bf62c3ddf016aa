"""What the server answers is what the engine answers, however it is asked."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
from server.support import DOCUMENTS, QUESTION, chat, refused
from tiny_tokenizer import build_tokenizer

from blocktune.data import RagExample
from blocktune.engine import Sampling
from blocktune.methods import Weights, available, build
from blocktune.methods.base import METHODS
from blocktune.prompt import Chunk, make_pieces
from blocktune.server.front import chat_pieces, read_messages
from blocktune.server.schemas import Message

CHUNKS = (
    Chunk("Anna Belt is in Kirby.", "Anna Belt"),
    Chunk("Walter Gray lives in Upper Lorne.", "Gray"),
    Chunk("The film Frozen Shore was shot in Port Alder."),
)
EXAMPLE = RagExample(QUESTION, CHUNKS)
DEEP = "droidspeak-clc"  # its defaults want more layers than this model has
SERVED = [n for n in available() if METHODS.find(n).weights is Weights.ANY and n != DEEP]
COMPOSED = [
    "droidspeak ratio=0.5",
    "droidspeak-clc check_layer=1 restart_layer=2",
    "naive + deviation 30 %",
    "ape + first-k 2",
    "cacheblend + scaled-context",
]


def text_of(response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def events(response) -> list[dict]:
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1] if line[0] != ":"]


def forget(engine) -> None:
    """What earlier prompts left behind, and what methods with a history learnt of them."""
    engine.forget()
    engine.store.notes.clear()


@pytest.mark.parametrize("method", SERVED + COMPOSED)
def test_server_equals_engine_and_stream_equals_both(client, engine, method):
    forget(engine)
    expected = engine.answer([EXAMPLE], build(method), max_new_tokens=12)[0]
    forget(engine)
    body = chat(blocktune={"method": method})
    response = client.post("/v1/chat/completions", json=body)
    assert text_of(response) == expected.text
    usage = response.json()["usage"]
    assert usage["prompt_tokens"] == expected.usage.prompt_tokens
    assert usage["completion_tokens"] == len(expected.token_ids)
    own = response.json()["blocktune"]
    assert own["usage"]["layer_tokens"] == list(expected.usage.layer_tokens)
    forget(engine)
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    streamed = events(client.post("/v1/chat/completions", json=body))
    pieces = [c["delta"].get("content", "") for e in streamed for c in e["choices"]]
    assert "".join(pieces) == expected.text
    assert streamed[-1]["usage"]["completion_tokens"] == len(expected.token_ids)


def test_requests_that_decode_together_answer_as_alone(client, engine):
    """Mixed methods and lengths, more than run at once, each joining and leaving by itself."""
    asked = []
    for index in range(24):
        method = ("naive", "cacheblend", "ape", "full-prefill", "epic")[index % 5]
        chunks = CHUNKS[index % 3 :] + CHUNKS[: index % 3]
        asked.append((method, RagExample(QUESTION, chunks[: 1 + index % 3]), 1 + index % 12))
    expected = [
        engine.answer([example], method, max_new_tokens=tokens)[0].text
        for method, example, tokens in asked
    ]

    def post(one) -> str:
        method, example, tokens = one
        documents = [{"title": c.title, "text": c.text} for c in example.chunks]
        body = chat(documents=documents, max_tokens=tokens, blocktune={"method": method})
        return text_of(client.post("/v1/chat/completions", json=body))

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(post, asked)) == expected


def test_decoding_steps_are_shared(client, monkeypatch):
    from blocktune.server import scheduler

    sizes = []
    step = scheduler.decode_step

    def counted(choices):
        sizes.append(len(choices))
        return step(choices)

    monkeypatch.setattr(scheduler, "decode_step", counted)
    body = chat("Name all of them.", max_tokens=40, n=4, temperature=1.0, seed=3)
    assert client.post("/v1/chat/completions", json=body).status_code == 200
    assert max(sizes) == 4


def test_a_seed_draws_what_the_engine_draws(client, engine):
    sampling = Sampling(temperature=3.0, top_p=0.99, seed=11)
    expected = engine.answer([EXAMPLE], "naive", max_new_tokens=12, sampling=sampling)[0].text
    body = chat(temperature=3.0, top_p=0.99, seed=11)
    first = client.post("/v1/chat/completions", json=body | {"n": 3}).json()["choices"]
    again = client.post("/v1/chat/completions", json=body | {"n": 3}).json()["choices"]
    assert first == again
    assert first[0]["message"]["content"] == expected
    assert len({one["message"]["content"] for one in first}) > 1


def test_a_temperature_next_to_zero_is_greedy(client):
    greedy = text_of(client.post("/v1/chat/completions", json=chat()))
    assert text_of(client.post("/v1/chat/completions", json=chat(temperature=1e-320))) == greedy


@pytest.mark.parametrize("stop", ["Ald", ["der", "zzz"]])
def test_stop_texts_end_an_answer_and_are_left_out(client, stop):
    whole = text_of(client.post("/v1/chat/completions", json=chat()))
    first = stop if isinstance(stop, str) else stop[0]
    assert first in whole
    body = chat(stop=stop)
    response = client.post("/v1/chat/completions", json=body)
    assert text_of(response) == whole.split(first)[0].strip()
    assert response.json()["choices"][0]["finish_reason"] == "stop"
    streamed = events(client.post("/v1/chat/completions", json=body | {"stream": True}))
    pieces = [c["delta"].get("content", "") for e in streamed for c in e["choices"]]
    assert "".join(pieces) == whole.split(first)[0].strip()


def test_logprobs_and_lengths(client):
    body = chat(logprobs=True, top_logprobs=3, max_tokens=2)
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "length"
    content = choice["logprobs"]["content"]
    assert len(content) == 2
    for one in content:
        assert one["top_logprobs"][0]["token"] == one["token"]
        assert one["logprob"] == one["top_logprobs"][0]["logprob"] <= 0
        assert len(one["top_logprobs"]) == 3
    body = {"prompt": "The city of", "max_tokens": 3, "logprobs": 1}
    logs = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    assert len(logs["tokens"]) == len(logs["token_logprobs"]) == 3


def test_a_list_of_one_prompt_is_that_prompt_and_of_several_refused(client, engine):
    text = "The city of"
    ids = engine.tokenizer(text)["input_ids"]
    bodies = [{"prompt": one, "max_tokens": 3} for one in (text, [text], ids, [ids])]
    answers = [client.post("/v1/completions", json=body).json() for body in bodies]
    assert len({answer["choices"][0]["text"] for answer in answers}) == 1
    for several in ([text, text], []):
        refused = client.post("/v1/completions", json={"prompt": several, "max_tokens": 3})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "prompt")
        assert f"one prompt, got {len(several)}" in error["message"]
    for mixed in (["1", 2], [True, 2], [1.0, 2]):
        refused = client.post("/v1/completions", json={"prompt": mixed, "max_tokens": 3})
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt.0")


def test_a_single_question_is_tokenised_as_everywhere(engine):
    conversation = read_messages([Message(role="user", content=QUESTION)])
    fmt, tokenizer = engine.format, engine.tokenizer
    made = chat_pieces(tokenizer, fmt, CHUNKS, conversation)
    assert made == make_pieces(tokenizer, fmt, CHUNKS, QUESTION)
    apart = [Message(role="user", content=blocks()), Message(role="user", content=QUESTION)]
    assert read_messages(apart).question == QUESTION


@pytest.mark.parametrize("system", [[], [Message(role="system", content="Be brief.")]])
def test_a_greeting_of_the_assistant_stays_its_own(engine, system):
    said = [Message(role="assistant", content="Ask me."), Message(role="user", content=QUESTION)]
    tokenizer = build_tokenizer()
    if system:  # a template without a system turn
        refusal = "{% if messages[0].role == 'system' %}{{ raise_exception('no') }}{% endif %}"
        tokenizer.chat_template = refusal + tokenizer.chat_template
    made = chat_pieces(tokenizer, engine.format, CHUNKS, read_messages([*system, *said]))
    before, _, after = tokenizer.decode(made.prefix).partition("<|assistant|>\nAsk me.<|end|>")
    assert "Ask me." not in before
    assert ("Be brief." in before) == bool(system)
    assert after.startswith("\n<|user|>")


def test_a_new_document_that_occurs_twice_was_in_no_cache(client, engine):
    forget(engine)
    body = chat(documents=["She was the eldest of five."] * 3)
    counted = [client.post("/v1/chat/completions", json=body).json()["usage"] for _ in range(2)]
    cold, warm = (usage["prompt_tokens_details"]["cached_tokens"] for usage in counted)
    assert cold == 0 < warm


def test_earlier_turns_are_the_prefix_and_documents_stay_chunks(client, engine):
    turns = [
        {"role": "user", "content": "Who is she?"},
        {"role": "assistant", "content": "A chemist."},
        {"role": "user", "content": [*blocks(), {"type": "text", "text": QUESTION}]},
    ]
    body = {"messages": turns, "max_tokens": 4, "blocktune": {"strip": True}}
    client.post("/v1/chat/completions", json=chat())  # chunks are in the cache now
    answer = client.post("/v1/chat/completions", json=body).json()
    own = answer["blocktune"]
    assert [(c["id"], c["cached"]) for c in own["chunks"]] == [("a", "memory"), ("c", "memory")]
    text = "".join(t for run in own["strip"] if run["kind"] == "prefix" for t in run["tokens"])
    assert "Who is she?" in text
    assert "A chemist." in text
    again = client.post("/v1/chat/completions", json=body).json()
    assert (
        again["usage"]["prompt_tokens_details"]["cached_tokens"]
        > (answer["usage"]["prompt_tokens_details"]["cached_tokens"])
    )


def test_a_conversation_is_computed_from_where_its_last_turn_ended(client, engine):
    said = [("Who is she?", "A chemist."), ("Of which city?", "Of Kirby."), (QUESTION, "Kirby.")]

    def ask(turns: int) -> tuple[str, int, list]:
        earlier = [
            {"role": role, "content": text}
            for pair in said[:turns]
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
        body = chat(max_tokens=8)
        body["messages"] = [*earlier, {"role": "user", "content": "Where is Walter Gray?"}]
        made = client.post("/v1/chat/completions", json=body).json()
        tiers = [chunk["cached"] for chunk in made["blocktune"]["chunks"]]
        counted = made["usage"]["prompt_tokens_details"]["cached_tokens"]
        return made["choices"][0]["message"]["content"], counted, tiers

    engine.forget()
    alone = ask(3)[0]
    engine.forget()
    client.post("/v1/chunks", json={"documents": DOCUMENTS})
    made = [ask(turns) for turns in (1, 2, 3)]
    assert all(tiers == ["memory"] * 3 for _, _, tiers in made)
    cached = [counted for _, counted, _ in made]
    assert cached[0] < cached[1] < cached[2]  # each finds the turns of those before it
    assert made[2][0] == alone
    assert ask(3)[1] > cached[2]  # and now the whole prefix


def test_a_prompt_without_documents_is_resumed_where_it_was_known(client, engine):
    long = "Tell me all about Anna Belt, of whom I have heard so much in Kirby."
    turns = [{"role": "user", "content": long}]

    def ask(*turns: dict) -> dict:
        body = {"messages": turns, "max_tokens": 6, "blocktune": {"strip": True}}
        return client.post("/v1/chat/completions", json=body).json()

    def cached(answer: dict) -> int:
        return answer["usage"]["prompt_tokens_details"]["cached_tokens"]

    engine.forget()
    first, again = ask(*turns), ask(*turns)
    assert cached(again) == first["usage"]["prompt_tokens"] - 1
    assert again["choices"] == first["choices"]
    assert {run["fate"] for run in again["blocktune"]["strip"]} == {"reused", "computed"}
    said = first["choices"][0]["message"]["content"]
    more = ({"role": "assistant", "content": said}, {"role": "user", "content": QUESTION})
    later = ask(*turns, *more)
    assert cached(later) > cached(again) - 10  # all but the start of the answer's turn
    engine.forget()
    assert ask(*turns, *more)["choices"] == later["choices"]


def test_an_exact_prefix_is_reused_where_it_was(client):
    body = chat(blocktune={"method": "prefix-cache", "strip": True})
    for _ in "ab":
        runs = client.post("/v1/chat/completions", json=body).json()["blocktune"]["strip"]
    assert {run["fate"] for run in runs if run["kind"] == "chunk"} == {"reused"}


def blocks() -> list[dict]:
    source = {"type": "text", "media_type": "text/plain", "data": CHUNKS[0].text}
    other = {"type": "text", "media_type": "text/plain", "data": CHUNKS[2].text}
    return [
        {"type": "document", "id": "a", "title": "Anna Belt", "source": source},
        {"type": "document", "id": "c", "source": other},
    ]


def test_the_strip_says_what_became_of_every_token(client):
    body = chat(blocktune={"method": "epic", "params": {"k": 2}, "strip": True})
    client.post("/v1/chat/completions", json=body)
    answer = client.post("/v1/chat/completions", json=body).json()
    runs = answer["blocktune"]["strip"]
    assert sum(len(run["tokens"]) for run in runs) == answer["usage"]["prompt_tokens"]
    fates = {run["fate"] for run in runs if run["kind"] == "chunk"}
    assert fates == {"recomputed", "relocated"}
    again = [r for r in runs if r["fate"] == "recomputed"]
    assert sum(len(run["tokens"]) for run in again) == 2 * len(DOCUMENTS)
    assert runs[0]["fate"] == "reused"
    assert runs[-1]["fate"] == "computed"


def test_hits_are_reported_by_chunk_and_tier(engine, serve, tmp_path):
    from blocktune.cache import ChunkStore
    from blocktune.engine import Engine

    def own() -> Engine:
        return Engine(engine.model, engine.tokenizer, store=ChunkStore(folder=tmp_path))

    first = serve({"tiny": own()})
    tiers = []
    for client in (first, first, serve({"tiny": own()})):
        answer = client.post("/v1/chat/completions", json=chat()).json()
        tiers.append([chunk["cached"] for chunk in answer["blocktune"]["chunks"]])
        hits = answer["blocktune"]["usage"]["chunk_hits"]
        assert hits == sum(tier != "none" for tier in tiers[-1])
    assert tiers == [["none"] * 3, ["memory"] * 3, ["disk"] * 3]


def test_chunks_can_be_encoded_ahead_asked_for_and_deleted(client):
    documents = ["Noel Fisher directed it.", {"id": "x", "text": "It was in 1966."}]
    made = client.post("/v1/chunks", json={"documents": documents}).json()
    assert [one["encoded"] for one in made["data"]] == [True, True]
    assert [one["id"] for one in made["data"]] == [None, "x"]
    again = client.post("/v1/chunks", json={"documents": documents}).json()
    assert [one["cached"] for one in again["data"]] == ["memory", "memory"]
    answer = client.post("/v1/chat/completions", json=chat(documents=documents)).json()
    keys = [chunk["key"] for chunk in answer["blocktune"]["chunks"]]
    assert keys == [one["key"] for one in made["data"]]
    assert client.get(f"/v1/chunks/{keys[0]}").json()["cached"] == "stored"
    client.delete(f"/v1/chunks/{keys[0]}")
    assert client.get(f"/v1/chunks/{keys[0]}").json()["cached"] == "none"


def test_pinned_chunks_outlive_eviction_until_they_are_deleted(serve, engine):
    from blocktune.cache import ChunkStore
    from blocktune.engine import Engine

    size = engine.state.encoder.sample().num_bytes
    own = Engine(engine.model, engine.tokenizer, store=ChunkStore(200 * size))
    client = serve({"tiny": own}, limits={"pinned_bytes": 60 * size})

    def encode(*documents: str, **more) -> dict:
        return client.post("/v1/chunks", json={"documents": documents} | more)

    text, other = "Noel Fisher directed it.", "It was in 1966."
    keys = [encode(doc, pin=pin).json()["data"][0] for doc, pin in ((text, True), (other, False))]
    assert [one["pinned"] for one in keys] == [True, False]
    for number in range(40):  # far more than the store holds
        encode(f"The number {number} is that of the house.")
    found = [client.get(f"/v1/chunks/{one['key']}").json() for one in keys]
    assert [(one["cached"], one["pinned"]) for one in found] == [("stored", True), ("none", False)]
    answer = client.post("/v1/chat/completions", json=chat(documents=[text, other])).json()
    assert [one["cached"] for one in answer["blocktune"]["chunks"]] == ["memory", "none"]
    full = encode("a " * 80, pin=True)
    assert full.status_code == 400
    assert "pinned chunks" in full.json()["error"]["message"]
    gone = client.delete(f"/v1/chunks/{keys[0]['key']}").json()
    assert (gone["cached"], gone["pinned"]) == ("none", False)
    assert not client.service.scheduler.pinned


def test_a_chunk_that_the_store_cannot_keep_is_not_called_pinned(serve, engine, tmp_path):
    from blocktune.cache import ChunkStore
    from blocktune.engine import Engine

    store = ChunkStore.open(f"{tmp_path},memory=0,disk=10KB")
    client = serve({"tiny": Engine(engine.model, engine.tokenizer, store=store)})
    made = client.post("/v1/chunks", json={"documents": DOCUMENTS, "pin": True}).json()["data"]
    assert [one["pinned"] for one in made] == [False] * 3
    found = [client.get(f"/v1/chunks/{one['key']}").json()["cached"] for one in made]
    assert found == ["none"] * 3


def test_models_by_name_share_a_store_and_no_chunks(serve, engine):
    from copy import deepcopy

    from blocktune.engine import Engine

    model = deepcopy(engine.model)
    model.lm_head.weight.data[:64] *= 0.5
    other = Engine(model, engine.tokenizer, store=engine.store)
    engine.forget()
    client = serve({"one": engine, "two": other})
    assert [m["id"] for m in client.get("/v1/models").json()["data"]] == ["one", "two"]
    tiers = []
    for name in ("one", "two", "one", "two"):
        answer = client.post("/v1/chat/completions", json=chat(model=name)).json()
        assert answer["model"] == name
        tiers.append({chunk["cached"] for chunk in answer["blocktune"]["chunks"]})
    assert tiers == [{"none"}, {"none"}, {"memory"}, {"memory"}]


def test_without_a_seed_every_request_draws_anew(client):
    def texts(**more) -> set[str]:
        body = chat(temperature=50, max_tokens=8, **more)
        answers = [client.post("/v1/chat/completions", json=body).json() for _ in range(6)]
        return {answer["choices"][0]["message"]["content"] for answer in answers}

    assert len(texts()) > 1
    assert len(texts(seed=3)) == 1


@pytest.mark.parametrize("method", ["link0", "ape", "naive", "droidspeak"])
def test_chunks_encoded_ahead_are_those_that_the_default_method_reads(serve, engine, method):
    from blocktune.engine import Engine

    own = Engine(engine.model, engine.tokenizer, format=engine.format)
    client = serve({"tiny": own}, method=method)
    client.post("/v1/chunks", json={"documents": DOCUMENTS})
    answer = client.post("/v1/chat/completions", json=chat()).json()
    assert answer["blocktune"]["usage"]["chunk_hits"] == len(DOCUMENTS)
    own.encode(["Another text."], method=method)
    answer = client.post("/v1/chat/completions", json=chat(documents=["Another text."])).json()
    assert answer["blocktune"]["usage"]["chunk_hits"] == 1


def test_chunks_are_stored_under_their_documents_as_by_encode(serve, engine, tmp_path):
    from blocktune.cache import ChunkStore
    from blocktune.engine import Engine

    store = ChunkStore(folder=tmp_path)
    client = serve({"tiny": Engine(engine.model, engine.tokenizer, store=store)})
    client.post("/v1/chat/completions", json=chat(documents=["Noel Fisher directed it."]))
    documents = [{"id": "x", "text": "Noel Fisher directed it."}, {"title": "T", "text": "Old."}]
    documents += [{"id": "y", "text": "Old.", "title": "T"}]
    keys = client.post("/v1/chunks", json={"documents": documents}).json()["data"]
    assert [store.row(one["key"]).document for one in keys] == ["x", "T\ny", "T\ny"]


def test_chunks_that_the_default_method_would_not_read_are_not_encoded(serve):
    client = serve(method="cache-craft")
    refused(client.post("/v1/chunks", json={"documents": DOCUMENTS}), 400, "'cache-craft' reuses")


def test_pins_asked_for_at_once_keep_to_the_limit(serve, engine):
    from blocktune.cache import ChunkStore
    from blocktune.engine import Engine

    size = engine.state.encoder.sample().num_bytes
    own = Engine(engine.model, engine.tokenizer, store=ChunkStore(1 << 30))
    client = serve({"tiny": own}, limits={"pinned_bytes": 40 * size})

    def pin(number: int) -> bool:
        documents = [f"The harbour of Selby is near the house with the number {number}."]
        made = client.post("/v1/chunks", json={"documents": documents, "pin": True}).json()
        return "data" in made and made["data"][0]["pinned"]

    with ThreadPoolExecutor(8) as threads:
        assert 0 < sum(threads.map(pin, range(8))) < 4
    assert sum(client.service.scheduler.pinned.values()) <= 40 * size


def test_a_deletion_that_a_folder_refuses_is_no_success(serve, engine, tmp_path, monkeypatch):
    from blocktune.cache import ChunkStore
    from blocktune.cache.store.folder import ChunkFolder
    from blocktune.engine import Engine

    own = Engine(engine.model, engine.tokenizer, store=ChunkStore(folder=tmp_path))
    client = serve({"tiny": own})
    [made] = client.post("/v1/chunks", json={"documents": DOCUMENTS[:1]}).json()["data"]
    with monkeypatch.context() as patch:
        patch.setattr(ChunkFolder, "_remove", lambda *_: (_ for _ in ()).throw(PermissionError()))
        refused(client.delete(f"/v1/chunks/{made['key']}"), 503, "may still be stored")
    assert client.get(f"/v1/chunks/{made['key']}").json()["cached"] == "stored"
    assert client.delete(f"/v1/chunks/{made['key']}").json()["cached"] == "none"


def test_a_deleted_chunk_leaves_no_hidden_states(serve, engine, tmp_path):
    from blocktune.cache import ChunkStore
    from blocktune.engine import Engine

    own = Engine(engine.model, engine.tokenizer, store=ChunkStore(folder=tmp_path))
    client = serve({"tiny": own}, method="droidspeak")
    before = set(tmp_path.rglob("*.safetensors"))
    [made] = client.post("/v1/chunks", json={"documents": DOCUMENTS[:1]}).json()["data"]
    new = {path.stem for path in set(tmp_path.rglob("*.safetensors")) - before}
    assert len(new) > 2  # with the prefix
    assert client.delete(f"/v1/chunks/{made['key']}").json()["cached"] == "none"
    kinds = {row.kind for row in own.store._blobs[0].ledger.rows(num_tokens=made["tokens"])}
    assert not kinds
