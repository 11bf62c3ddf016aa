"""Seeds of one method are averaged question by question."""

import pytest
from evaluation.fake_results import fake_rows, fake_suite

from blocktune.evaluation.pooling import check_pools, with_pools
from blocktune.evaluation.results import build_results
from blocktune.evaluation.ttft import TtftSummary


def test_a_pool_is_the_mean_over_questions_not_more_questions():
    suite, rows = fake_suite(), fake_rows()
    object.__setattr__(suite, "pool", {"tuned": ["block-attention", "kvlink"]})
    times = TtftSummary(0.01, 0.01, 0.01, 1, 10)
    methods = build_results(suite, rows, dict.fromkeys(rows, times), {})["methods"]
    pool, one, two = (methods[label] for label in ("tuned", "block-attention", "kvlink"))
    assert pool["n"] == one["n"] == 400
    assert pool["score"] == pytest.approx((one["score"] + two["score"]) / 2)
    assert pool["pool"] == ["block-attention", "kvlink"]
    assert (one["pool"], pool["ttft_s"]) == (None, 0.01)  # seeds take the same time
    assert list(methods)[-1] == "tuned"
    assert 0 < pool["score_minus"]["naive"]["p"] < 0.001


def test_further_scores_are_averaged_too():
    rows = fake_rows()
    pooled = with_pools(rows, {"x": ["naive", "kvlink"]})["x"]
    expected = [(a.score + b.score) / 2 for a, b in zip(rows["naive"], rows["kvlink"], strict=True)]
    assert [row.score for row in pooled] == expected


@pytest.mark.parametrize(
    ("pools", "message"),
    [
        ({"a": ["b", "c"]}, "has the label of a method"),
        ({"x": ["a"]}, "two or more method labels"),
        ({"x": ["a", "z"]}, "there are a, b, c"),
        ({"x": "a"}, "must be a list"),
    ],
)
def test_wrong_pools_are_refused(pools, message):
    with pytest.raises(ValueError, match=message):
        check_pools(pools, ["a", "b", "c"])
