"""A model on disk, and the command line in this process."""

import pytest
import torch
from tiny_tokenizer import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from blocktune.cli import app


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A random Llama of two layers whose context holds 512 tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def blocktune():
    """Runs a command line and returns its result: exit code, standard output and error."""
    return lambda *arguments: CliRunner().invoke(app, [str(part) for part in arguments])


@pytest.fixture
def refused(blocktune):
    """Runs a command line that must fail on a user's mistake; returns the one line it prints."""

    def run(*arguments) -> str:
        result = blocktune(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stdout == ""
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1, result.stderr
        return result.stderr

    return run
