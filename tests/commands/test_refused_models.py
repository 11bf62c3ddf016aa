"""A model that chunk reuse would be wrong on is refused in one line before anything is written."""

import pytest
from families import HEAD, only_configured
from training.runs import write_run
from transformers import GPT2Config, Qwen3NextConfig

GPT2 = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}
NEXT = {**HEAD, "num_hidden_layers": 4, "num_experts": 4, "linear_num_value_heads": 4}
MODELS = {
    "gpt2": (lambda: GPT2Config(**GPT2), "GPT2LMHeadModel has no rotary position embedding"),
    "qwen3-next": (
        lambda: Qwen3NextConfig(**NEXT),
        "'linear_attention' in layer 0 and 2 more mixes",
    ),
}


@pytest.mark.parametrize("command", ["train", "dry-run", "encode", "check", "answer", "serve"])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_refused_before_its_weights_are_read(refused, tmp_path, name, command):
    config, reason = MODELS[name]
    model, out = only_configured(tmp_path / "other", config()), tmp_path / "out"
    documents = tmp_path / "documents.jsonl"
    documents.write_text('{"text": "Kirby is small."}\n')
    run = write_run(tmp_path, model_name_or_path=model)
    line = {
        "train": ("train", "--config", run),
        "dry-run": ("train", "--config", run, "--dry-run"),
        "check": ("check", "--model", model),
        "answer": ("answer", "--model", model, "--question", "Who?", "--chunk", "She."),
        "serve": ("serve", "--model", model),
        "encode": ("encode", "--model", model, "--input", documents, "--store", out),
    }[command]
    assert reason in refused(*line)
    assert not out.exists()
