"""Answers from cached chunks, on the device and in the model's dtype."""

import pytest
import torch
from measure import METHODS, measure_cached_answer, random_example, word_tokenizer

from blocktune.engine import Engine
from blocktune.methods import build


@pytest.fixture(scope="module")
def engine(shape) -> Engine:
    return Engine(shape.model(), word_tokenizer(shape.vocabulary))


@torch.no_grad()
def test_every_token_fresh_matches_full_prefill(engine, shape):
    example = random_example(shape)
    full = engine.next_logits([example], "full-prefill").float()
    fresh = engine.next_logits([example], build("epic", k=shape.chunk + 1)).float()
    naive = engine.next_logits([example], "naive").float()
    # Two ways to sum the same attention: the last bits of bfloat16 logits differ.
    tolerance = 1e-5 if shape.dtype == "float32" else 0.05
    assert (fresh - full).abs().max() < tolerance
    assert naive.isfinite().all()


def test_cached_answers_find_their_chunks_and_usage_for_them(shape):
    results = measure_cached_answer(shape, repeats=1)
    assert list(results) == list(METHODS)
    for name in METHODS[1:]:
        assert results[name]["chunk_hits"] == shape.tokens // shape.chunk
        assert results[name]["chunk_misses"] == 0
    assert results["naive"]["recompute_ratio"] == 0 < results["epic"]["recompute_ratio"]
    assert results["full-prefill"]["recompute_ratio"] == 1
