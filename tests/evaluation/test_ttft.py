"""Timing asks every method the same prompts in turn, warm by chunk and cold as a whole."""

from types import SimpleNamespace

import pytest

from blocktune.data import RagExample
from blocktune.evaluation.ttft import fill, measure_ttft
from blocktune.prompt import Chunk


def example(name: str, count: int = 2) -> RagExample:
    return RagExample(f"{name}?", tuple(Chunk(f"{name}{i}") for i in range(count)))


def test_methods_take_turns_and_only_the_second_answer_counts():
    asked = []

    def method(label, seconds):
        def ask(example):
            asked.append((label, "".join(chunk.text for chunk in example.chunks)))
            usage = SimpleNamespace(ttft_s=next(seconds), context_tokens=7)
            return SimpleNamespace(usage=usage)

        return ask

    methods = {
        "a": method("a", iter([9, 1, 9, 2, 9, 6])),
        "b": method("b", iter([9, 3, 9, 3, 9, 3])),
    }
    steps = []
    summaries = measure_ttft(methods, [example(n) for n in "xyz"], lambda: steps.append(1))
    warm, measured = "x1x0", "x0x1"
    assert asked[:4] == [("a", warm), ("b", warm), ("a", measured), ("b", measured)]
    assert asked[4][0] == "b"  # the order turns
    assert len(steps) == len(asked) == 12
    assert summaries["a"] == (2, 1.5, 4, 3, 7)
    assert summaries["b"] == (3, 3, 3, 3, 7)


def test_prompts_are_filled_with_what_follows():
    examples = [example(name) for name in "xyz"]
    filled = fill(examples, 2, 3)
    assert [e.question for e in filled] == ["x?", "y?"]
    assert [[c.text for c in e.chunks] for e in filled] == [["x0", "x1", "y0"], ["y0", "y1", "z0"]]
    assert fill(examples, 2, None) == examples[:2]
    assert [c.text for c in fill(examples, 3, 4)[2].chunks] == ["z0", "z1", "x0", "x1"]


def test_more_chunks_than_there_are_is_refused():
    with pytest.raises(ValueError, match="prompts of 7 chunks, the task holds only 6"):
        fill([example(name) for name in "xyz"], 1, 7)
