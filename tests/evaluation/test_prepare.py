"""A task's wording and an adapter's own: what is said wins, what is not said stays as trained."""

import copy

import pytest
from tiny_llama import tiny_llama
from tiny_tokenizer import build_tokenizer

from blocktune.engine import Engine
from blocktune.evaluation.prepare import prepare
from blocktune.evaluation.suite import parse_suite
from blocktune.prompt import PromptFormat

ASKED = {"instruction": "Answer in a few words.", "question": "Q: {question}"}


def ready(prompt: dict | None, **trained):
    """A suite over a base and an adapter that was trained in its own wording."""
    tokenizer = build_tokenizer()
    base = Engine(tiny_llama(tokenizer, 2048), tokenizer)
    tuned = copy.copy(base).reworded(PromptFormat(**trained))
    task = {
        "name": "worlds",
        "source": "worlds:test?n=2&passages=2&kinds=self-contained",
        "prompt": prompt,
    }
    methods = ["full-prefill", {"name": "naive", "adapter": "out/tuned"}]
    suite = parse_suite(
        {"model": "random", "methods": methods, "tasks": [task], "ttft": {"num": 0}}
    )
    return prepare(suite, lambda _, adapter: tuned if adapter else base)


def test_an_adapter_keeps_the_tag_that_the_task_does_not_name(caplog):
    made = ready(ASKED, block_tag="[Block]", full_tag="[Full]")
    tuned, base = (made.worded[adapter, "worlds"].format for adapter in ("out/tuned", None))
    assert tuned == PromptFormat(**ASKED, block_tag="[Block]", full_tag="[Full]")
    assert base == PromptFormat(**ASKED)
    assert "other words than it was trained in (instruction, question)" in caplog.text


def test_an_adapter_asked_as_it_was_trained_is_no_news(caplog):
    made = ready(ASKED, **ASKED, block_tag="[Block]")
    assert made.worded["out/tuned", "worlds"].format.block_tag == "[Block]"
    assert not caplog.text


@pytest.mark.parametrize("prompt", [None, ASKED])
def test_a_wording_that_the_base_does_not_get_is_refused(prompt):
    with pytest.raises(ValueError, match=r"build different prompts .*wordings differ in system"):
        ready(prompt, **ASKED if prompt else {}, system="Be brief.")
    ready(dict(ASKED, system="Be brief."), **ASKED, system="Be brief.")
