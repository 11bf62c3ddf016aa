"""Tokenizer and model need not agree on ids: pads use a real row, other tokens are named."""

import json
import shutil

import pytest
import torch
import yaml
from transformers import AutoTokenizer

from blocktune import BlockDataCollator, Engine

QUESTION = {"question": "Where was Anna born?", "answers": ["Kirby"]}
PLAIN = QUESTION | {"chunks": ["Anna Belt was born in Kirby.", "Kirby is small."]}
SHORT = {"question": "Who?", "chunks": ["Anna."], "answers": ["Anna"]}
MARKED = QUESTION | {"chunks": ["Anna.", "See <doc120> there."]}
MESSAGE = "token '<doc120>' has id"


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def grown(model, tmp_path):
    """The model with a tokenizer to which a pad and a token were added, without a resize."""
    folder = tmp_path / "grown"
    shutil.copytree(model, folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<doc120>"])
    assert tokenizer.pad_token_id == size
    tokenizer.save_pretrained(folder)
    return folder


def test_a_pad_without_a_row_changes_nothing(model, grown):
    asks = [PLAIN, SHORT]  # of two lengths, so the batch is padded
    engines = [Engine.from_pretrained(str(folder), device="cpu") for folder in (model, grown)]
    for engine in engines:
        engine.answer(asks, "cacheblend", max_new_tokens=3)
    one, other = (engine.next_logits(list(map(_example, asks)), "naive") for engine in engines)
    assert torch.equal(one, other)
    context = engines[1].cache(PLAIN["chunks"]).inputs("Who?")
    assert context["pad_token_id"] < engines[1].model.config.vocab_size


def _example(record):
    from blocktune import RagExample

    return RagExample.from_json(record)


@pytest.mark.parametrize("command", ["answer", "encode", "eval", "train", "profile-layers"])
def test_a_token_without_a_row_is_named(refused, grown, tmp_path, command):
    path = lines(tmp_path / "q.jsonl", PLAIN, MARKED)
    suite = {"model": str(grown), "methods": ["naive"], "ttft": {"num": 0}}
    suite["tasks"] = [{"name": "mine", "source": str(path)}]
    (tmp_path / "suite.yaml").write_text(yaml.safe_dump(suite))
    arguments = {
        "answer": ("-m", grown, "-i", path),
        "encode": ("-m", grown, "-i", path, "--store", tmp_path / "out"),
        "eval": ("--suite", tmp_path / "suite.yaml", "--output", tmp_path / "out"),
        "train": (
            *("--model_name_or_path", grown, "--train_data", path, "--use_peft"),
            *("--output_dir", tmp_path / "out", "--report_to", "none"),
        ),
        "profile-layers": ("-m", grown, "-i", path),
    }
    line = refused(command, *arguments[command])
    assert MESSAGE in line
    assert "resize_token_embeddings" in line
    if command in ("answer", "train"):
        assert "question 2" in line or "example 1" in line
    assert not list((tmp_path / "out").rglob("*.safetensors"))


def test_a_training_answer_counts_too(grown):
    tokenizer = AutoTokenizer.from_pretrained(grown)
    collator = BlockDataCollator(tokenizer, num_tokens=len(tokenizer) - 2)
    batch = collator([PLAIN, SHORT])
    assert int(batch["input_ids"].max()) < len(tokenizer) - 2
    with pytest.raises(ValueError, match=MESSAGE):
        collator([PLAIN | {"answers": ["<doc120>"]}])
