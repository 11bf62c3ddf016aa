"""A model on disk, and the command line in this process."""

from dataclasses import replace

import pytest
from tiny_llama import tiny_llama
from tiny_tokenizer import build_tokenizer
from typer.testing import CliRunner

from blocktune.commands import app
from blocktune.engine import Engine


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """A random Llama of two layers whose context holds 512 tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = build_tokenizer()
    tiny_llama(tokenizer, 512).save_pretrained(folder)
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


@pytest.fixture
def replies_end():
    """A random model never ends its turn; what it wrote is taken as a whole reply."""
    answer = Engine.answer

    def ended(self, *args, **options):
        stop = min(self.state.stop_ids())
        answers = answer(self, *args, **options)
        return [replace(one, token_ids=(*one.token_ids, stop)) for one in answers]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "answer", ended)
        yield
