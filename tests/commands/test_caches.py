"""Recycling, response caches, decode caches and presses on the command line."""

import json

import pytest
from tiny_tokenizer import build_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from blocktune.cache.store.records import MODEL

ASK = ("--question", "Where was Anna born?", "--chunk", "Anna Belt was born in Port Alder.")
SHORT = ("--max-new-tokens", "4", "--json")


def usage(result) -> dict:
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["usage"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> str:
    """DialoGPT's architecture."""
    folder, tokenizer = tmp_path_factory.mktemp("gpt2"), build_tokenizer()
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=512, eos_token_id=2
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_recycled_prompts_of_an_earlier_command(blocktune, gpt2, tmp_path):
    line = ("answer", "-m", gpt2, *ASK, "--store", tmp_path / "cache", *SHORT)
    found = [usage(blocktune(*line, "--method", "recycle"))["prefix_tokens"] for _ in "ab"]
    assert found[0] == 0 < found[1]


def test_whole_answers_of_an_earlier_command(blocktune, model, tmp_path):
    line = ("answer", "-m", model, *ASK, "--store", tmp_path / "cache", *SHORT)
    first, second = (blocktune(*line, "--response-cache", "exact") for _ in "ab")
    assert (usage(first)["recalled"], usage(second)["recalled"]) == (None, 1.0)
    assert json.loads(first.stdout)["answer"] == json.loads(second.stdout)["answer"]
    similar = ("--question", "In which place was Anna born?", *ASK[2:])
    semantic = ("answer", "-m", model, "--store", tmp_path / "similar", *SHORT)
    semantic = (*semantic, "--response-cache", "semantic:0.6")
    first, near = (usage(blocktune(*semantic, *ask))["recalled"] for ask in (ASK, similar))
    assert first is None
    assert 0.6 <= near < 1
    drawn = (*line, "--response-cache", "exact", "--temperature", "0.7")
    assert [usage(blocktune(*drawn))["recalled"] for _ in "ab"] == [None, None]
    seeded = (*drawn, "--seed", "0")
    assert [usage(blocktune(*seeded))["recalled"] for _ in "ab"] == [None, 1.0]


def test_decoding_on_another_cache(blocktune, model):
    for kind in ("fp8", "sliding:64"):
        assert usage(blocktune("answer", "-m", model, *ASK, *SHORT, "--decode-cache", kind))


@pytest.mark.parametrize(
    "other", [["--decode-cache", "sliding:4"], ["--store", "memory=1GB,codec=int4"]]
)
def test_answers_on_another_cache_are_not_taken_for_these(
    blocktune, refused, model, tmp_path, other
):
    (tmp_path / "q.jsonl").write_text('{"question": "Who?", "chunks": ["Anna is here."]}\n')
    words = ["answer", "-m", model, "-i", tmp_path / "q.jsonl", "-o", tmp_path / "a.jsonl"]
    assert blocktune(*words, "--method", "naive").exit_code == 0
    assert blocktune(*words, "--method", "naive").exit_code == 0
    assert "not an answer of this command" in refused(*words, "--method", "naive", *other)


def test_thinned_chunks(blocktune, model, tmp_path):
    documents = tmp_path / "documents.jsonl"
    documents.write_text(json.dumps({"text": ASK[3]}) + "\n")
    place = f"{tmp_path / 'cache'},press=knorm:0.5"
    assert blocktune("encode", "-m", model, "-i", documents, "--store", place).exit_code == 0
    whole = usage(blocktune("answer", "-m", model, *ASK, *SHORT))
    thin = usage(blocktune("answer", "-m", model, *ASK, *SHORT, "--store", place))
    assert (thin["chunk_hits"], thin["chunk_misses"]) == (1, 0)
    assert thin["context_tokens"] == whole["context_tokens"] // 2


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (("--response-cache", "semantic"), "a response cache is 'exact' or 'semantic:THRESHOLD"),
        (("--response-cache", "semantic:0.9:/none"), "cannot load an embedding model from"),
        (("--method", "recycle", "--param", "model=/none"), "cannot load an embedding model from"),
        (("--decode-cache", "int3"), "a decode cache is one of sliding:TOKENS"),
        (("--store", "press=none:0.5"), "a press is NAME:RATIO"),
        (("--store", "press=knorm:0.5", "--method", "epic"), "unlike press 'knorm:0.5'"),
    ],
)
def test_mistakes_are_one_line(refused, model, options, reason, monkeypatch):
    if options[0] in ("--decode-cache", "--store") or options[1] == "semantic":
        monkeypatch.setattr("blocktune.engine.Engine.from_pretrained", None)  # found before
    assert reason in refused("answer", "-m", model, *ASK, *options)


def test_a_model_with_absolute_positions_names_what_serves_it(refused, gpt2):
    line = refused("answer", "-m", gpt2, *ASK)
    assert "no rotary position embedding (RoPE)" in line
    assert "use recycle, prefix-cache" in line


def test_passages_by_embeddings_that_are_computed_once(blocktune, tmp_path, monkeypatch):
    corpus, questions = tmp_path / "corpus.jsonl", tmp_path / "questions.jsonl"
    texts = ("Bread is baked at night.", "A physician cures people.", "The ship left the port.")
    corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    questions.write_text('{"question": "Who heals the sick?", "answer": "physician"}\n')
    line = ("data", "passages", questions, "--corpus", corpus, "--k", "1")
    dense = (*line, "--embedder", MODEL, "--store", tmp_path / "cache")
    found = []
    for number in range(2):
        out = tmp_path / f"{number}.jsonl"
        result = blocktune(*dense, "-o", out)
        assert result.exit_code == 0, result.stderr
        found.append(json.loads(out.read_text()))
        monkeypatch.setattr("sentence_transformers.SentenceTransformer.encode", None)
    assert found[0] == found[1]
    assert texts[1] in json.dumps(found[0])
    assert found[0]["meta"]["retriever"] == "dense"
    assert 0 < found[0]["meta"]["scores"][0] < 1


def test_an_embedder_needs_a_corpus(refused, tmp_path):
    line = ("data", "passages", "q.jsonl", "--own", "-o", tmp_path / "o", "--embedder", MODEL)
    assert "--embedder needs --corpus" in refused(*line)
