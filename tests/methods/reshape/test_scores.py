"""Reshapes on literal scores."""

import math

import pytest
import torch

from blocktune.layout import GLOBAL, NO_CHUNK, Kind, Rows
from blocktune.methods.reshape import RESHAPES, ScaledContext, Seen, TopChunks, chunk_scores

INF = float("inf")


def rows(kinds, chunks):
    kind = torch.tensor([kinds])
    order = torch.arange(len(kinds))[None]
    same = torch.zeros_like(kind)
    return Rows(
        kind=kind,
        chunk=torch.tensor([chunks]),
        offset=same,
        position=order,
        order=order,
        group=same + GLOBAL,
        sample=same,
        supersedes=same - 1,
        until=same + 9,
    )


def seen_of(kinds, chunks, reused, query=(Kind.QUERY,), query_chunks=(NO_CHUNK,)):
    key = rows(kinds, chunks)
    return Seen(rows(query, query_chunks), key, torch.tensor([reused]), max(chunks) + 1)


PREFIX, CHUNK, QUERY = Kind.PREFIX, Kind.CHUNK, Kind.QUERY


def test_scaled_context_is_the_merge_of_two_softmaxes():
    reused = [False, True, True, False, False]
    seen = seen_of((PREFIX, CHUNK, CHUNK, CHUNK, QUERY), (-1, 0, 0, 0, -1), reused)
    scores = torch.tensor([[[[0.3, 1.2, -0.4, 2.0, 0.1]]]])
    made = ScaledContext(temperature=0.5, scale=0.8).scores(scores, seen, None).softmax(-1)[0, 0, 0]
    cooled = torch.tensor([1.2, -0.4]) / 0.5
    other = torch.tensor([0.3, 2.0, 0.1])
    lse = torch.stack([0.8 * 0.5 * cooled.logsumexp(0), other.logsumexp(0)])
    share = lse.softmax(0)
    expected = torch.cat([cooled.softmax(0) * share[0], other.softmax(0) * share[1]])
    torch.testing.assert_close(made[[1, 2, 0, 3, 4]], expected)


def test_scaled_context_leaves_rows_without_reused_keys_finite_and_alone():
    seen = seen_of((PREFIX, CHUNK, QUERY), (-1, 0, -1), [False, True, False])
    scores = torch.tensor([[[[0.3, -INF, 0.1]]]])
    assert ScaledContext(temperature=0.5).scores(scores.clone(), seen, None).equal(scores)


def test_scaled_context_acts_only_where_something_is_reused():
    nothing = seen_of((PREFIX, CHUNK, QUERY), (-1, 0, -1), [False, False, False])
    assert not ScaledContext().acts(nothing)
    assert ScaledContext().acts(nothing._replace(reused=torch.tensor([[False, True, False]])))


def test_chunk_scores_sum_the_five_largest_probabilities():
    weights = torch.tensor([0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.5, 0.1, 0.19])[None, None, None]
    chunk = torch.tensor([[0, 0, 0, 0, 0, 0, NO_CHUNK, 2, 2]])
    made = chunk_scores(weights, chunk, 3)
    torch.testing.assert_close(made[0, 0, 0], torch.tensor([0.2, 0.0, 0.29]))


QUESTION = rows((QUERY, QUERY, Kind.ANSWER), (-1, -1, -1))
# Two heads, two rows of the question and one of the answer, three chunks.
SURVEY = torch.tensor(
    [
        [
            [[0.9, 0.1, 0.0], [0.0, 0.3, 0.2], [0.1, 0.2, 0.3]],
            [[0.0, 0.0, 0.9], [0.2, 0.0, 0.9], [0.9, 0.1, 0.0]],
        ]
    ]
)


@pytest.mark.parametrize(
    ("aggregation", "best"),
    [
        ("none", [[0, 1, 2], [2, 2, 0]]),
        ("T", [[0, 0, 2], [2, 2, 0]]),
        ("HT", [[2, 2, 0]]),
    ],
)
def test_rows_of_the_question_choose_together_as_far_as_told(aggregation, best):
    reshape = TopChunks(chunks=1, aggregation=aggregation)
    kept = reshape.choose(SURVEY, QUESTION)
    assert kept.sum(-1).eq(1).all()
    assert kept[0].int().argmax(-1).tolist() == best


def test_a_recomputed_row_keeps_its_own_chunk_besides():
    row = rows((CHUNK,), (1,))
    kept = TopChunks(chunks=1, aggregation="none").choose(SURVEY[:, :1, :1], row)
    assert kept[0, 0, 0].tolist() == [True, True, False]


def test_top_chunks_hides_chunks_and_nothing_else():
    seen = seen_of((PREFIX, CHUNK, CHUNK, Kind.LINK, QUERY), (-1, 0, 1, 1, -1), [False] * 5)
    choice = torch.tensor([[[[True, False]]]])
    made = TopChunks(chunks=1).scores(torch.zeros(1, 1, 1, 5), seen, choice)
    assert made[0, 0, 0].tolist() == [0, 0, -INF, 0, 0]


def test_neutral_reshapes_change_nothing():
    seen = seen_of((PREFIX, CHUNK, CHUNK, QUERY), (-1, 0, 1, -1), [False, True, True, False])
    scores = torch.tensor([[[[0.3, 1.2, -0.4, 0.5]]]])
    for name in RESHAPES.available():
        neutral = RESHAPES.build(name).neutral()
        choice = None
        if neutral.surveys:
            choice = neutral.choose(neutral.survey(scores, seen), seen.query)
        torch.testing.assert_close(neutral.scores(scores.clone(), seen, choice), scores)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("scaled-context", {"temperature": 0}, "temperature must be a number above 0, got 0"),
        ("scaled-context", {"scale": math.nan}, "scale must be a number above 0, got nan"),
        ("scaled-context", {"temperature": math.inf}, "temperature must be a number .* got inf"),
        ("top-chunks", {"chunks": 0}, "chunks must be .* at least 1, got 0"),
        ("top-chunks", {"aggregation": "TH"}, "one of none, T, HT, LHT, got 'TH'"),
        ("scaled", {}, "unknown reshape 'scaled'; .*available: scaled-context, top-chunks"),
        ("top-chunks", {"k": 2}, "'top-chunks' takes chunks, aggregation, got unknown k"),
    ],
)
def test_bad_names_and_values_are_refused_when_built(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        RESHAPES.build(name, **parameters)


def test_only_rows_that_choose_alone_keep_causality():
    assert [TopChunks(aggregation=a).keeps_causality for a in ("none", "HT")] == [True, False]
    assert ScaledContext().keeps_causality
