"""Frontiers, equal budgets and sweeps, worked by hand."""

import pytest
from evaluation.fake_results import fake_results, fake_rows

from blocktune.evaluation.aggregate import matched, pareto, sweeps
from blocktune.evaluation.rows import Row


def cell(score: float, ratio: float, ttft: float | None = None, **minus) -> dict:
    return {"score": score, "recompute_ratio": ratio, "ttft_s": ttft, "score_minus": minus}


def test_the_front_holds_who_is_not_beaten_at_its_cost():
    methods = {
        "full": cell(0.9, 1.0, 4.0),
        "naive": cell(0.5, 0.0, 1.0),
        "tuned": cell(0.8, 0.0, 1.0),
        "epic": cell(0.7, 0.1, 2.0),
        "blend": cell(0.85, 0.2, 2.0),
    }
    assert pareto(methods) == {
        "recompute_ratio": ["tuned", "blend", "full"],
        "ttft_s": ["tuned", "blend", "full"],
    }
    methods["full"]["ttft_s"] = None
    assert list(pareto(methods)) == ["recompute_ratio"]


def test_only_methods_of_the_same_budget_are_matched():
    minus = {"mean": 0.1, "ci95": [0, 0.2], "p_holm": 0.03}
    methods = {
        "naive": cell(0.4, 0.0),
        "tuned": cell(0.6, 0.0),  # computing nothing is no budget to match
        "epic": cell(0.5, 0.15),
        "blend": cell(0.6, 0.165, epic=minus),
        "half": cell(0.7, 0.5),
    }
    [pair] = matched(methods)
    assert (pair["better"], pair["worse"]) == ("blend", "epic")
    assert pair["budget"] == pytest.approx(0.1575)
    assert pair["mean"] == 0.1


def test_sweeps_put_questions_into_bins_by_place_and_length():
    def row(index: int, place: float | None, tokens: int) -> Row:
        right = float(index % 2)
        name = str(index)
        usage = {"context_tokens": tokens}
        return Row(
            name, "t", name, "", "", "", right, right, right, 0, usage, score=right, place=place
        )

    own = [row(i, i / 39, 100 + i) for i in range(40)]
    none = [row(i, i / 39, 0) for i in range(40)]
    found = sweeps({"no-context": none, "naive": own})
    assert [one["n"] for one in found["place"]] == [8] * 5
    assert found["place"][0]["from"] == 0
    assert found["place"][-1]["to"] == 1
    assert found["context_tokens"][0]["from"] == 100  # the longest that any method read
    assert found["place"][0]["scores"]["naive"]["score"] == 0.5
    assert sweeps({"naive": own[:6]})["place"] == []


def test_questions_of_one_place_are_no_sweep():
    assert fake_results()["sweeps"] == {"place": [], "context_tokens": []}
    assert len(fake_rows()) == len(fake_results()["methods"])
