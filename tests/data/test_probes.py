"""Needles over a grid, conversations and code: the answer follows from the text."""

import importlib
import sys

import pytest

from blocktune.data import load_examples

GRID = "needle:?lengths=700,1400&depths=0,50,100&n=2&chunk=100"


def test_needle_stands_at_its_depth(tokenizer):
    examples = load_examples(GRID, tokenizer=tokenizer)
    assert len(examples) == 12
    assert len({example.kind for example in examples}) == 6
    assert examples[2].kind == "700 tokens, depth 50 %"
    for example in examples:
        text = " ".join(chunk.text for chunk in example.chunks)
        at = text.index("One of the special magic numbers") / len(text)
        assert at == pytest.approx(example.meta["depth"] / 100, abs=0.2)
        assert example.answers[0] in example.chunks[example.supporting[0]].text
        assert 0.85 * 700 < example.meta["length"] <= int(example.kind.split()[0])
    assert load_examples(GRID, tokenizer=tokenizer, limit=3) == examples[:3]


def test_every_cell_hides_the_same_needles(tokenizer):
    answers = [example.answers for example in load_examples(GRID, tokenizer=tokenizer)]
    assert set(answers[::2]) == {answers[0]}
    assert set(answers[1::2]) == {answers[1]}


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
        ("needle:?depths=0,120", "needle:: 'depths' must be percent from 0 to 100"),
        ("needle:?lengths=a", "needle:: 'lengths' must be whole numbers with commas between"),
        ("needle:?lengths=50", r"needle: a prompt has at least \d+ tokens, got length 50"),
        ("needle:x", "'needle:' is followed by options"),
        ("dialogue:?turns=3", "dialogue:: 'turns' must be at least 4, got 3"),
        ("dialogue:?kinds=magic", "'kinds' must be of recall, update, reference, got magic"),
        ("code:?files=99", "code:: 'files' must be from 2 to 16, got 99"),
        ("code:?n=0", "code:: 'n' must be at least 1, got 0"),
    ],
)
def test_bad_options_are_one_line(tokenizer, source, message):
    with pytest.raises(ValueError, match=message) as error:
        load_examples(source, tokenizer=tokenizer)
    assert "\n" not in str(error.value)
