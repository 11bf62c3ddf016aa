"""Places and encodings row by row."""

import pytest

from blocktune.layout import Kind
from blocktune.prompt import LayoutSpec, Pieces, lay_out, wrapped

PIECES = Pieces(prefix=(1, 2), chunks=((3, 4, 5), (6,)), query=(7, 8))
BOS, BLANK_ID = 1, 50
PREFIX, CHUNK, QUERY, BLANK = (
    int(kind) for kind in (Kind.PREFIX, Kind.CHUNK, Kind.QUERY, Kind.BLANK)
)


def rows(prompt, *names):
    return {name: getattr(prompt.layout, name)[0].tolist() for name in names}


def test_a_dropped_bos_is_a_blank_before_each_chunk():
    prompt = lay_out(PIECES, LayoutSpec(bos="drop"), bos_id=BOS)
    assert prompt.ids == (1, 2, BOS, 3, 4, 5, BOS, 6, 7, 8)
    assert rows(prompt, "kind", "position", "order", "group") == {
        "kind": [1, 1, BLANK, 2, 2, 2, BLANK, 2, 4, 4],
        "position": [0, 1, 1, 2, 3, 4, 4, 5, 6, 7],
        "order": [0, 1, 1, 2, 3, 4, 4, 5, 6, 7],
        "group": [-1, -1, 0, 0, 0, 0, 1, 1, -1, -1],
    }


def test_a_kept_bos_is_the_first_token_of_each_chunk():
    spec = LayoutSpec(bos="keep")
    prompt = lay_out(PIECES, spec, bos_id=BOS)
    assert prompt.ids == (1, 2, BOS, 3, 4, 5, BOS, 6, 7, 8)
    assert rows(prompt, "kind", "offset", "position") == {
        "kind": [1, 1, 2, 2, 2, 2, 2, 2, 4, 4],
        "offset": [0, 1, 0, 1, 2, 3, 0, 1, 0, 1],
        "position": list(range(10)),
    }
    assert wrapped((3, 4, 5), spec, None, BOS) == (BOS, 3, 4, 5)


def test_reserved_slots_leave_positions_unused_but_no_order():
    prompt = lay_out(PIECES, LayoutSpec(placement="reserved", slot=4))
    assert rows(prompt, "position", "order") == {
        "position": [0, 1, 2, 3, 4, 6, 10, 11],
        "order": list(range(8)),
    }


def test_a_chunk_of_an_earlier_prompt_follows_its_own_blanks():
    prompt = lay_out(PIECES, LayoutSpec(), contexts=[(), (1, 2, 9, 9, 9, 9, 9)])
    assert prompt.ids == (1, 2, 3, 4, 5, 1, 2, 9, 9, 9, 9, 9, 6, 7, 8)
    assert rows(prompt, "kind", "position", "order", "group") == {
        "kind": [1, 1, 2, 2, 2, *[BLANK] * 7, 2, 4, 4],
        "position": [0, 1, 2, 3, 4, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7],
        "order": [0, 1, 2, 3, 4, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7],
        "group": [-1, -1, 0, 0, 0, *[1] * 8, -1, -1],
    }


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"bos": "yes"}, "layout 'bos' must be none or drop or keep, got 'yes'"),
        ({"bos": "drop", "num_blanks": 2}, "drop all but one of num_blanks, bos"),
        ({"bos": "drop", "shared_prefix": True}, "drop all but one of shared_prefix, bos"),
        ({"bos": "drop", "block": False}, r"full attention .* has none; drop bos"),
        ({"placement": "reserved"}, "needs a slot .* got placement 'reserved' and slot 0"),
        ({"slot": 9}, "got placement 'sequential' and slot 9"),
        ({"slot": -1}, "layout 'slot' must be an integer of at least 0"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LayoutSpec(**values)


@pytest.mark.parametrize("bos", ["drop", "keep"])
def test_a_bos_must_be_given(bos):
    with pytest.raises(ValueError, match="lay_out needs bos_id"):
        lay_out(PIECES, LayoutSpec(bos=bos))
