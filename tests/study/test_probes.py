"""The study's generated sources, a plug-in: the answer follows from the text."""

import importlib
import sys
from pathlib import Path

import pytest

from blocktune.data import load_examples

PLUGIN = str(Path(__file__).resolve().parents[2] / "eval/study/probes.py")


@pytest.fixture(autouse=True)
def probes(monkeypatch):
    monkeypatch.setenv("BLOCKTUNE_PLUGINS", PLUGIN)


def test_conversation_ends_with_what_holds():
    examples = load_examples("dialogue:?n=60&turns=7")
    assert {example.kind for example in examples} == {"recall", "update", "reference"}
    for example in examples:
        assert len(example.chunks) == 7
        assert list(example.supporting) == sorted(example.supporting)
        needed = [example.chunks[i].text for i in example.supporting]
        event = example.question.removeprefix("On which day is the ").removesuffix("?")
        [answer] = example.answers
        if example.kind == "recall":
            assert [f"The {event} is on {answer}" in text for text in needed] == [True]
        elif example.kind == "update":
            plan, change = needed
            assert f"The {event} is on " in plan
            assert f"The {event} moves to {answer}." in change
        else:
            opening, plan, change = needed
            assert f"plan, the {event} and then" in opening
            assert f"The one I named first moves to {answer}." in change
            assert answer not in plan


def test_conversations_are_the_same_for_a_seed():
    assert load_examples("dialogue:?n=9") == load_examples("dialogue:?n=9")
    assert load_examples("dialogue:?n=9", limit=4) == load_examples("dialogue:?n=4")
    assert load_examples("dialogue:?n=9&seed=1") != load_examples("dialogue:?n=9")
    kinds = {example.kind for example in load_examples("dialogue:?n=9&kinds=update")}
    assert kinds == {"update"}


@pytest.mark.parametrize("kind", ["constant", "import", "call"])
def test_code_returns_what_is_claimed(tmp_path, monkeypatch, kind):
    for number, example in enumerate(load_examples(f"code:?n=12&files=5&kinds={kind}")):
        folder = tmp_path / str(number)
        folder.mkdir()
        for chunk in example.chunks:
            (folder / chunk.title).write_text(chunk.text)
        monkeypatch.syspath_prepend(folder)
        modules = [chunk.title.removesuffix(".py") for chunk in example.chunks]
        call = example.question.split()[2].removesuffix("()")
        module, function = call.split(".")
        assert str(getattr(importlib.import_module(module), function)()) == example.answers[0]
        assert module in {modules[i] for i in example.supporting}
        assert len(example.supporting) == (1 if kind == "constant" else 2)
        for name in modules:
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("dialogue:?turns=3", "dialogue:: 'turns' must be at least 4, got 3"),
        ("dialogue:?kinds=magic", "'kinds' must be of recall, update, reference, got magic"),
        ("code:?files=99", "code:: 'files' must be from 2 to 16, got 99"),
        ("code:?n=0", "code:: 'n' must be at least 1, got 0"),
    ],
)
def test_bad_options_are_one_line(source, message):
    with pytest.raises(ValueError, match=message) as error:
        load_examples(source)
    assert "\n" not in str(error.value)
