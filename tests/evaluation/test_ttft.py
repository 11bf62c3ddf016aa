"""Timing asks every method the same prompts in turn, warm by chunk and cold as a whole."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from blocktune.data import RagExample
from blocktune.evaluation.prepare import fill
from blocktune.evaluation.ttft import CleanCaches, measure_ttft
from blocktune.prompt import Chunk


def example(name: str, count: int = 2) -> RagExample:
    return RagExample(f"{name}?", tuple(Chunk(f"{name}{i}") for i in range(count)))


@pytest.fixture
def asked(monkeypatch):
    """The method and chunks of each question that was asked; there are no caches to clean."""
    monkeypatch.setattr(CleanCaches, "prepare", lambda self, engine, method, own: None)
    return []


def timed(asked, examples, **seconds):
    """Times methods that take these seconds in turn, after an earlier prompt of 99 each."""

    def answer(examples, method, *, max_new_tokens, batch_size):
        [example] = examples
        assert (max_new_tokens, batch_size) == (1, 1)
        asked.append((method, example.chunks))
        taken = 99 if len(asked) % 2 else seconds[method].pop(0)
        return [SimpleNamespace(usage=SimpleNamespace(ttft_s=taken, context_tokens=7))]

    methods = tuple(SimpleNamespace(label=name) for name in seconds)
    engine = SimpleNamespace(answer=answer)
    ready = SimpleNamespace(
        suite=SimpleNamespace(methods=methods, tasks=[None]),
        methods={name: name for name in seconds},
        engine=lambda spec, task: engine,
        timed=examples,
    )
    return measure_ttft(ready, lambda examples, description: examples)


def test_methods_take_turns_after_an_earlier_prompt(asked):
    examples = [example(name) for name in "xyz"]
    summaries = timed(asked, examples, a=[1, 2, 6], b=[3, 3, 3])
    texts = [(method, "".join(chunk.text for chunk in chunks)) for method, chunks in asked]
    assert texts[:4] == [("a", "x1x0"), ("a", "x0x1"), ("b", "x1x0"), ("b", "x0x1")]
    assert texts[4][0] == "b"  # the order turns
    assert len(asked) == 2 * 6
    assert summaries["a"] == (2, 1.5, 4, 3, 7)
    assert summaries["b"] == (3, 3, 3, 3, 7)


def test_the_earlier_prompt_never_begins_with_the_same_chunk(asked):
    twice = replace(example("x"), chunks=example("x", 1).chunks * 2)
    timed(asked, [example("x", 1), twice], a=[1, 1])
    for (_, earlier), (_, chunks) in zip(asked[::2], asked[1::2], strict=True):
        assert earlier[0] != chunks[0]
        assert earlier[1:] == chunks


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
