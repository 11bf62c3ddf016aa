"""Scores equal those of the published programs, to the last digit."""

import json
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from blocktune.evaluation.metrics import (
    METRICS,
    filter_bias,
    require_metrics,
    rouge_l,
    ruler_any,
    ruler_recall,
)
from blocktune.evaluation.metrics.short_answers import first_line, token_f1

REFERENCE = json.loads((Path(__file__).parent / "reference_scores.json").read_text())
CASES = REFERENCE["cases"]


class Characters:
    """A tokenizer of one token per character after a BOS of 1, as the reference scores had."""

    bos_token_id = 1

    def __call__(self, text):
        return {"input_ids": [1, *map(ord, text)]}


@pytest.mark.parametrize("name", ["em", "f1", "qa_f1"])
def test_short_answers_score_as_squad_and_longbench_do(name):
    scored = [METRICS[name].score(c["prediction"], c["answers"], None) for c in CASES]
    assert scored == [case[name] for case in CASES]


@pytest.mark.parametrize(("name", "metric"), [("recall", ruler_recall), ("any", ruler_any)])
def test_needles_score_as_ruler_does(name, metric):
    scores = [metric(c["prediction"], c["answers"]) for c in CASES]
    ours = [round(100 * score, 2) for score in scores]
    assert ours == [case[f"ruler_{name}_percent"] for case in CASES]
    mean = round(sum(scores) / len(scores) * 100, 2)
    assert mean == REFERENCE[f"ruler_{name}_percent"]


def test_token_f1_scores_as_cacheblend_does():
    known = [case for case in CASES if case["token_f1"] is not None]
    assert len(known) > 90
    scored = [token_f1(c["prediction"], c["answers"], Characters()) for c in known]
    assert scored == [case["token_f1"] for case in known]


def test_token_f1_scores_a_blank_output_where_the_source_fails():
    assert token_f1("", ["Alder"], Characters()) == 0
    assert first_line("  \nAlder") == "  "


def test_token_f1_drops_no_word_where_there_is_no_bos():
    class Words:
        bos_token_id = None

        def __call__(self, text):
            return {"input_ids": text.split()}

    assert token_f1("Port", ["Port Alder"], Words()) == pytest.approx(2 / 3, abs=0)


def test_rouge_l_is_the_librarys_with_stemming():
    wanted = "Anna met two directors in the museums"
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    prediction = "the directors meet Anna in a museum"
    expected = scorer.score(wanted, prediction)["rougeL"].fmeasure
    assert rouge_l(prediction, ["nothing alike", wanted]) == expected
    # By hand: "directors ... in ... museum" are 3 of 7 words on either side.
    assert expected == pytest.approx(3 / 7)


def test_the_filter_of_adjusted_f1_hides_what_it_says():
    own, full = [0.5, 1.0, 0.0, 0.4], [1.0, 0.0, 0.5, 0.0]
    bias, reverse = filter_bias(own, full)
    assert bias == pytest.approx((1.0 + 0.4) / 2)
    assert reverse == pytest.approx((1.0 + 0.0 + 0.0) / 3)
    kept = [0, 2]
    adjusted_gap = sum(full[i] - own[i] for i in kept)
    raw_gap = sum(full) - sum(own)
    assert adjusted_gap - raw_gap == pytest.approx(bias * len(kept))
    assert filter_bias([1.0], [0.0]) == (None, 0.0)


def test_every_metric_names_its_source_and_unknown_ones_are_refused():
    assert all(metric.source and metric.title for metric in METRICS.values())
    with pytest.raises(ValueError, match="unknown metric 'bleu'; available: em, f1"):
        require_metrics(["em", "bleu"])
    for metric in METRICS.values():
        with pytest.raises(ValueError, match="accepted answer"):
            metric.score("x", [], Characters())
