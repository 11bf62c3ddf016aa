"""Contexts vary by seed alone, and what holds the evidence stays."""

import pytest

from blocktune.data.example import RagExample
from blocktune.data.mixture import Augment, augment
from blocktune.parsing import read
from blocktune.prompt import Chunk

CHUNKS = tuple(Chunk(f"passage {i}", f"T{i}") for i in range(6))
EXAMPLE = RagExample("Who?", CHUNKS, ("Ann Belt",), supporting=(1, 4))
POOL = [Chunk(f"other {i}") for i in range(40)]


def supported(example):
    return [example.chunks[i] for i in example.supporting]


def test_order_is_drawn_per_example_and_seed():
    how = Augment(shuffle=True)
    varied = [augment(EXAMPLE, index, how) for index in range(20)]
    assert varied == [augment(EXAMPLE, index, how) for index in range(20)]
    assert len({example.chunks for example in varied}) > 10
    assert varied[0] != augment(EXAMPLE, 0, Augment(shuffle=True, seed=1))
    for example in varied:
        assert set(example.chunks) == set(CHUNKS)
        assert set(supported(example)) == {CHUNKS[1], CHUNKS[4]}


def test_without_a_change_the_example_stays():
    assert augment(EXAMPLE, 0, Augment(), POOL) == EXAMPLE


@pytest.mark.parametrize(
    ("how", "sizes"),
    [
        (Augment(num_chunks=4), {4}),
        (Augment(num_chunks=(3, 5)), {3, 4, 5}),
        (Augment(num_chunks=1), {2}),
        (Augment(num_distractors=0), {2}),
        (Augment(num_distractors=(1, 2)), {3, 4}),
        (Augment(num_chunks=9), {9}),
    ],
)
def test_number_of_chunks(how, sizes):
    varied = [augment(EXAMPLE, index, how, POOL) for index in range(40)]
    assert {len(example.chunks) for example in varied} == sizes
    for example in varied:
        assert supported(example) == [CHUNKS[1], CHUNKS[4]]
        assert len(set(example.chunks)) == len(example.chunks)


def test_added_distractors_come_from_the_pool_and_mention_no_answer():
    pool = [Chunk("By ANN belt, in 1966"), CHUNKS[0], *POOL[:2]]
    varied = augment(EXAMPLE, 0, Augment(num_distractors=6), pool)
    assert set(varied.chunks) == {*CHUNKS, *POOL[:2]}
    with pytest.raises(ValueError, match="needs 3 chunks of others, 2 fit"):
        augment(EXAMPLE, 0, Augment(num_distractors=7), pool)


def test_what_mentions_the_answer_is_evidence_where_the_source_names_none():
    chunks = (Chunk("nothing"), Chunk("It was Ann Belt."), Chunk("Ann Belton"))
    example = RagExample("Who?", chunks, ("ann belt",))
    assert augment(example, 0, Augment(num_distractors=0)).chunks == chunks[1:2]
    unknown = RagExample("Who?", chunks, ("Zoe",))
    assert augment(unknown, 0, Augment(num_distractors=0)).chunks == chunks


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"shufle": True}, "unknown key 'shufle'; known: shuffle, num_chunks"),
        ({"shuffle": 1}, "'shuffle' must be true or false, got 1"),
        ({"num_chunks": 0}, "augment 'num_chunks' must be at least 1 or"),
        ({"num_chunks": [5, 3]}, r"at least 1 or \[low, high\], got \[5, 3\]"),
        ({"num_distractors": -1}, "augment 'num_distractors' must be at least 0"),
        ({"num_chunks": 3, "num_distractors": 2}, "num_chunks or num_distractors, not both"),
        ({"seed": "x"}, "'seed' must be a whole number"),
    ],
)
def test_bad_values_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        read(Augment, values, "augment")
