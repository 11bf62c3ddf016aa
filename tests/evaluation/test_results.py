"""From rows to results: pools of seeds, frontiers, equal budgets and sweeps, worked by hand."""

import json
import re

import pytest
from evaluation.fake_results import fake_results, fake_rows, fake_suite
from evaluation.test_suite import MINIMAL

from blocktune.evaluation.results import (
    build_results,
    matched,
    pareto,
    plain_label,
    sweeps,
    with_pools,
)
from blocktune.evaluation.rows import Row
from blocktune.evaluation.suite import check_pools, parse_suite
from blocktune.evaluation.ttft import TtftSummary


def test_a_pool_is_the_mean_over_questions_not_more_questions():
    suite, rows = fake_suite(), fake_rows()
    object.__setattr__(suite, "pool", {"tuned": ["block-attention", "kvlink"]})
    times = TtftSummary(0.01, 0.01, 0.01, 1, 10)
    fidelity = {"block-attention": {"kl": 1.0, "keys": [1.0]}, "kvlink": {"kl": 2.0, "keys": [3.0]}}
    methods = build_results(suite, rows, dict.fromkeys(rows, times), {}, fidelity)["methods"]
    alone = fake_results()["methods"]
    assert list(methods) == ["full-prefill", "no-context", "naive", "tuned", "cacheblend", "epic"]
    pool, members = methods["tuned"], ("block-attention", "kvlink")
    assert pool["n"] == 400
    assert pool["seeds"] == {label: alone[label]["score"] for label in members}
    assert pool["score"] == pytest.approx(sum(pool["seeds"].values()) / 2)
    assert methods["naive"]["seeds"] == {}
    assert pool["ttft_s"] == 0.01  # seeds take the same time
    assert pool["fidelity"] == {"kl": 1.5, "keys": [2.0]}
    assert methods["naive"]["fidelity"] is None
    assert 0 < pool["score_minus"]["naive"]["p"] < 0.001


def test_an_entry_with_seeds_is_one_entry_a_seed_and_their_pool():
    entry = {"name": "kvlink + epic", "adapter": "out/link-{seed}", "seeds": [0, 2]}
    other = {"name": "naive", "label": "mine", "adapter": "{seed}/a", "seeds": [1, 3]}
    suite = parse_suite(MINIMAL | {"methods": ["naive", entry, other]})
    assert [(spec.label, spec.adapter) for spec in suite.methods] == [
        ("naive", None),
        ("kvlink + epic-0", "out/link-0"),
        ("kvlink + epic-2", "out/link-2"),
        ("mine-1", "1/a"),
        ("mine-3", "3/a"),
    ]
    assert suite.pool == {
        "kvlink + epic": ["kvlink + epic-0", "kvlink + epic-2"],
        "mine": ["mine-1", "mine-3"],
    }


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"name": "kvlink", "adapter": "a", "seeds": [0, 1]}, "must hold {seed}, such as"),
        ({"name": "kvlink", "seeds": [0, 1]}, "got None"),
        ({"name": "kvlink", "adapter": "a-{seed}", "seeds": ["0"]}, "list of whole numbers"),
        ({"name": "kvlink", "adapter": "a-{seed}", "seeds": 3}, "must be a list"),
        ({"name": "kvlink", "adapter": "a-{seed}", "seeds": [1]}, "two or more method labels"),
    ],
)
def test_wrong_seeds_are_refused(entry, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_suite(MINIMAL | {"methods": [entry]}, "s.yaml")


def test_seeds_of_two_entries_with_one_name_are_not_mixed_up():
    """The pool of the first entry would be lost, and its seeds would be methods by themselves."""
    first = {"name": "kvlink", "adapter": "a-{seed}", "seeds": [0, 1]}
    second = {"name": "kvlink", "adapter": "b-{seed}", "seeds": [2, 3]}
    with pytest.raises(ValueError, match=r"methods\[1\]: 'kvlink' has seeds above; give this a"):
        parse_suite(MINIMAL | {"methods": [first, second]})
    suite = parse_suite(MINIMAL | {"methods": [first, second | {"label": "other"}]})
    assert suite.pool == {"kvlink": ["kvlink-0", "kvlink-1"], "other": ["other-2", "other-3"]}


def test_a_baseline_with_parameters_does_not_take_the_place_of_the_plain_one():
    results = json.loads(json.dumps(fake_results()))
    methods = results["methods"]
    results["methods"] = {"naive without BOS": methods["epic"] | {"method": "naive"}} | methods
    assert plain_label(results, "naive") == "naive"
    del results["methods"]["naive"]
    assert plain_label(results, "naive") == "naive without BOS"


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
        ({"x": [["a"], "b"]}, "two or more method labels, got ..'a'., 'b'."),
        ({"x": ["a", "a"]}, "pool member 'a' is given 2 times; pool it once"),
        ({"x": ["a", "b"], "y": ["a", "b", "c"]}, "pool member 'a' is given 2 times"),
        ({"x": ["a", "z"]}, "there are a, b, c"),
        ({"x": "a"}, "must be a list"),
    ],
)
def test_wrong_pools_are_refused(pools, message):
    with pytest.raises(ValueError, match=message):
        check_pools(pools, ["a", "b", "c"])


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
