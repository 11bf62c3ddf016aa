"""The example prints what the engine answers."""

import runpy
from pathlib import Path

import pytest

from blocktune import Engine, RagExample

ROOT = Path(__file__).resolve().parents[2]
MODEL = str(ROOT / "data/tiny")


@pytest.mark.parametrize("method", ["naive", "cacheblend"])
def test_the_example_prints_the_engines_answers(capsys, method):
    example = runpy.run_path(str(ROOT / "examples/generate_from_cache.py"))
    example["main"](MODEL, method)
    asks = [RagExample(question, tuple(example["CHUNKS"])) for question in example["QUESTIONS"]]
    answers = Engine.from_pretrained(MODEL).answer(asks, method, max_new_tokens=16)
    lines = [f"{a.question} -> {b.text}" for a, b in zip(asks, answers, strict=True)]
    assert capsys.readouterr().out.splitlines() == lines
