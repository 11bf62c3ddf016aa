"""Timing asks every method the same prompts in turn, warm by chunk and cold as a whole."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from blocktune.data import RagExample
from blocktune.evaluation.ttft import fill, measure_ttft
from blocktune.prompt import Chunk


def example(name: str, count: int = 2) -> RagExample:
    return RagExample(f"{name}?", tuple(Chunk(f"{name}{i}") for i in range(count)))


def test_methods_take_turns_after_an_earlier_prompt():
    asked = []

    def method(label, seconds):
        def ask(*examples):
            texts = ["".join(chunk.text for chunk in example.chunks) for example in examples]
            asked.append((label, *texts))
            usage = SimpleNamespace(ttft_s=next(seconds), context_tokens=7)
            return SimpleNamespace(usage=usage)

        return ask

    methods = {
        "a": method("a", iter([1, 2, 6])),
        "b": method("b", iter([3, 3, 3])),
    }
    summaries = measure_ttft(methods, [example(n) for n in "xyz"])
    assert asked[:2] == [("a", "x1x0", "x0x1"), ("b", "x1x0", "x0x1")]
    assert asked[2][0] == "b"  # the order turns
    assert len(asked) == 6
    assert summaries["a"] == (2, 1.5, 4, 3, 7)
    assert summaries["b"] == (3, 3, 3, 3, 7)


def test_the_earlier_prompt_never_begins_with_the_same_chunk():
    asked = []

    def ask(earlier, timed):
        asked.append((earlier.chunks, timed.chunks))
        return SimpleNamespace(usage=SimpleNamespace(ttft_s=1, context_tokens=7))

    twice = replace(example("x"), chunks=example("x", 1).chunks * 2)
    measure_ttft({"a": ask}, [example("x", 1), twice])
    for earlier, timed in asked:
        assert earlier[0] != timed[0]
        assert earlier[1:] == timed


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
