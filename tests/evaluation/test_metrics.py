"""Metrics against hand-worked values and, to the last digit, the published programs."""

import json
from pathlib import Path

import pytest
from rouge_score.rouge_scorer import RougeScorer

from blocktune.evaluation.metrics import (
    METRICS,
    adjusted_f1,
    chatrag_f1,
    exact_match,
    extract_answer,
    first_line,
    normalize_answer,
    rouge_l,
    ruler_recall,
    substring_em,
    token_f1,
    word_f1,
)


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        ("The  Port of Alder!", "port of alder"),
        ("a an the", ""),
        ("U.S.A.", "usa"),  # punctuation goes first, so no word boundary is left behind
        ("rock-'n'-roll", "rocknroll"),
        ("A.an", "aan"),  # an article is a whole word once punctuation is gone
        ("theatre", "theatre"),
        ("It’s “quoted”", "it’s “quoted”"),  # noqa: RUF001  only ASCII punctuation is dropped
        ("\tNew\nYork ", "new york"),
        ("Cafe\u0301", "caf\u00e9"),  # both forms of an accent are one
    ],
)
def test_normalisation_follows_squad(text, normalised):
    assert normalize_answer(text) == normalised


def test_exact_match_takes_the_best_answer():
    assert exact_match("the Beatles.", ["Queen", "Beatles"]) == 1
    assert exact_match("Beatles band", ["Queen", "Beatles"]) == 0


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Port Alder", ["Port-Alder"], 1.0),
        ("U.S.", ["us", "u s a"], 1.0),  # u and s; the a is an article
        ("the", ["a"], 0.0),
        ("", ["Alder"], 0.0),
    ],
)
def test_chatrag_f1_reads_punctuation_as_spaces(prediction, answers, expected):
    assert chatrag_f1(prediction, answers) == pytest.approx(expected)
    assert METRICS["chatrag_f1"].score(prediction, answers, None) == chatrag_f1(prediction, answers)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("Port Alder", ["Port Alder"], 1.0),
        ("the port of Alder", ["Port Alder"], 2 * (2 / 3) * 1 / (2 / 3 + 1)),  # 2 of 3, 2 of 2
        ("Alder", ["Port Alder", "Alder Bay City"], 2 * 1 * 0.5 / 1.5),  # 2/3 beats 1/2
        ("x x y", ["x y y"], 2 / 3),  # bags: x and y shared once each
        ("Belt", ["Alder"], 0.0),
        ("", ["Alder"], 0.0),
        ("the", ["a"], 1.0),  # both empty after normalisation: v2.0 says they agree
    ],
)
def test_word_f1_is_worked_by_hand(prediction, answers, expected):
    assert word_f1(prediction, answers) == pytest.approx(expected, abs=0)


def test_substring_match_is_by_character():
    assert substring_em("It lies in Port Alder, I think", ["Port Alder"]) == 1
    assert substring_em("portable", ["port"]) == 1  # as best_subspan_em does
    assert substring_em("Port of Alder", ["Port Alder"]) == 0
    assert substring_em("anything", ["the"]) == 0


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (" Port Alder.", "Port Alder"),
        (" 3.14. ", "3.14"),
        ("J. R.", "J. R"),  # one period only, and normalisation drops the rest
        ("", ""),
    ],
)
def test_an_answer_has_no_white_space_and_period_around_it(text, answer):
    assert extract_answer(text) == answer


def test_adjusted_f1_keeps_what_full_prefill_can_do():
    assert adjusted_f1([1.0, 0.5, 0.8], [0.2, 0.0, 1.0])[:2] == (0.9, 2)
    assert adjusted_f1([1.0], [0.0]) == (None, 0, None)


def test_adjusted_f1_refuses_unpaired_scores():
    with pytest.raises(ValueError, match="longer"):
        adjusted_f1([1.0], [0.2, 0.0])


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


def test_needles_score_as_ruler_does():
    scores = [ruler_recall(c["prediction"], c["answers"]) for c in CASES]
    ours = [round(100 * score, 2) for score in scores]
    assert ours == [case["ruler_recall_percent"] for case in CASES]
    mean = round(sum(scores) / len(scores) * 100, 2)
    assert mean == REFERENCE["ruler_recall_percent"]


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
    bias = adjusted_f1(own, full).bias
    assert bias == pytest.approx((1.0 + 0.4) / 2)
    kept = [0, 2]
    adjusted_gap = sum(full[i] - own[i] for i in kept)
    raw_gap = sum(full) - sum(own)
    assert adjusted_gap - raw_gap == pytest.approx(bias * len(kept))


def test_every_metric_has_a_title_and_wants_an_answer():
    assert all(metric.title for metric in METRICS.values())
    for metric in METRICS.values():
        with pytest.raises(ValueError, match="accepted answer"):
            metric.score("x", [], Characters())
