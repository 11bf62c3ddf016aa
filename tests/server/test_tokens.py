"""The texts of tokens: parts of characters, and tokenizers that drop the space of a first token."""

import json

import pytest
from server.support import CHAT, chat
from tiny_llama import tiny_llama
from tiny_tokenizer import TEXT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from blocktune.engine import Engine

WILD = {"temperature": 100, "seed": 3, "max_tokens": 40}
"""Nearly uniform draws: many are parts of characters."""


@pytest.fixture(scope="module")
def spaced():
    """An engine whose tokens hold the space before them, as those of Llama 2 and Mistral."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], show_progress=False
    )
    backend.train_from_iterator(TEXT.splitlines(), trainer)
    names = {"bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **names)
    return Engine(tiny_llama(tokenizer, 512), tokenizer)


def streamed(client, path: str, body: dict) -> list[dict]:
    lines = client.post(path, json=body | {"stream": True}).text.split("\n\n")
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return [choice for part in parts for choice in part["choices"]]


def test_a_completion_goes_on_where_its_prompt_ends(serve, spaced):
    client = serve({"tiny": spaced})
    body = {"prompt": "Anna Belt was born in", "logprobs": 2} | WILD
    choice = client.post("/v1/completions", json=body).json()["choices"][0]
    tokens = choice["logprobs"]["tokens"]
    assert any(token.startswith(" ") for token in tokens)
    assert choice["text"] == "".join(tokens).removesuffix("</s>")
    first = next(seed for seed in range(50) if opens_a_word(client, body | {"seed": seed}))
    parts = streamed(client, "/v1/completions", body | {"seed": first})
    assert "".join(part["text"] for part in parts).startswith(" ")


def opens_a_word(client, body: dict) -> bool:
    logs = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    return logs["tokens"][0].startswith(" ") and len(logs["tokens"][0]) > 1


def test_an_answer_still_begins_without_a_space(serve, spaced):
    body = chat(logprobs=True, blocktune={"strip": True}) | WILD
    answer = serve({"tiny": spaced}).post(CHAT, json=body).json()
    choice = answer["choices"][0]
    text = "".join(entry["token"] for entry in choice["logprobs"]["content"])
    assert choice["message"]["content"] == text.removesuffix("</s>").strip()
    prompt = "".join(text for run in answer["blocktune"]["strip"] for text in run["tokens"])
    assert "Anna Belt is in Kirby." in prompt


def test_the_bytes_of_a_part_of_a_character_are_unknown(client):
    body = chat(logprobs=True, top_logprobs=5) | WILD
    content = client.post(CHAT, json=body).json()["choices"][0]["logprobs"]["content"]
    entries = [entry for one in content for entry in (one, *one["top_logprobs"])]
    parts = [entry["bytes"] for entry in entries if "\ufffd" in entry["token"]]
    assert parts
    assert not any(parts)
    whole = [entry for entry in entries if "\ufffd" not in entry["token"]]
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in whole)


def test_a_stream_places_its_tokens_as_the_whole_does(client):
    body = {"prompt": "The city of", "logprobs": 20} | WILD
    client.post("/v1/completions", json=body)  # the next ones resume from what it has computed
    logs = client.post("/v1/completions", json=body).json()["choices"][0]["logprobs"]
    parts = [part["logprobs"] for part in streamed(client, "/v1/completions", body)]
    for name, values in logs.items():
        assert [value for part in parts if part for value in part[name]] == values
    for chosen, likeliest in zip(logs["token_logprobs"], logs["top_logprobs"], strict=True):
        assert max(likeliest.values()) >= chosen
