"""Metrics against hand-worked values and the rules of SQuAD's official script."""

import pytest

from blocktune.evaluation.metrics import (
    AdjustedF1,
    Scores,
    adjusted_f1,
    exact_match,
    extract_answer,
    normalize_answer,
    score,
    substring_em,
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
    ("text", "marker", "answer"),
    [
        ("Anna Belt. Answer: Port Alder.", "Answer:", "Port Alder"),
        ("Answer: no. Answer:  yes ", "Answer:", "yes"),
        ("Port Alder", "Answer:", "Port Alder"),
        ("Anna Belt. Answer:", "Answer:", ""),
        (" 3.14. ", None, "3.14"),
        ("J. R.", None, "J. R"),  # one period only, and normalisation drops the rest
    ],
)
def test_extraction_takes_what_follows_the_last_marker(text, marker, answer):
    assert extract_answer(text, marker) == answer


def test_score_gives_all_three():
    assert score("in Port Alder", ["Port Alder"]) == Scores(em=0, f1=0.8, substring_em=1)


def test_scoring_without_answers_is_refused():
    with pytest.raises(ValueError, match="accepted answer"):
        score("Port Alder", [])


def test_adjusted_f1_keeps_what_full_prefill_can_do():
    assert adjusted_f1([1.0, 0.5, 0.8], [0.2, 0.0, 1.0]) == AdjustedF1(0.9, 2)
    assert adjusted_f1([1.0], [0.0]) == AdjustedF1(None, 0)


def test_adjusted_f1_refuses_unpaired_scores():
    with pytest.raises(ValueError, match="longer"):
        adjusted_f1([1.0], [0.2, 0.0])
