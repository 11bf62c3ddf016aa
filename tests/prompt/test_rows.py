"""Rows, literally: what `lay_out`, `pack`, `stack` and `show` make of pieces."""

from dataclasses import fields, replace

import pytest
import torch
from tiny_tokenizer import build_tokenizer

from blocktune.attention import dense_mask
from blocktune.layout import FOREVER, GLOBAL, NO_ROW, Kind, Layout
from blocktune.prompt import LayoutSpec, Pieces, Prompt, lay_out, pack, show, stack, wrapped

PAD, PREFIX, CHUNK, LINK, QUERY, ANSWER, BLANK, WRAP = (int(kind) for kind in Kind)
PIECES = Pieces(prefix=(1, 2), chunks=((3, 4, 5), (6,)), query=(7, 8), answer=(9,))
SHORT = Pieces(prefix=(1,), chunks=((3,),), query=(7,), answer=(9, 10))
UNANSWERED = PIECES._replace(answer=())
LINK_BASE, BLANK_ID, BOS = 100, 50, 1


def labels(prompt):
    return tuple(stack([prompt], 0).labels[0].tolist())


def rows(prompt: Prompt, *names: str) -> dict[str, list[int]]:
    return {name: getattr(prompt.layout, name)[0].tolist() for name in names}


def test_sequential():
    prompt = lay_out(PIECES, LayoutSpec())
    assert prompt.ids == (1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert labels(prompt) == (-100,) * 8 + (9,)
    assert rows(prompt, *(f.name for f in fields(Layout))) == {
        "kind": [PREFIX, PREFIX, CHUNK, CHUNK, CHUNK, CHUNK, QUERY, QUERY, ANSWER],
        "chunk": [-1, -1, 0, 0, 0, 1, -1, -1, -1],
        "offset": [0, 1, 0, 1, 2, 0, 0, 1, 0],
        "position": [0, 1, 2, 3, 4, 5, 6, 7, 8],
        "order": [0, 1, 2, 3, 4, 5, 6, 7, 8],
        "group": [-1, -1, 0, 0, 0, 1, -1, -1, -1],
        "sample": [0] * 9,
        "supersedes": [NO_ROW] * 9,
        "until": [FOREVER] * 9,
    }


def test_full_attention_differs_in_group_only():
    block, full = lay_out(PIECES, LayoutSpec()), lay_out(PIECES, LayoutSpec(block=False))
    assert rows(full, "group")["group"] == [GLOBAL] * 9
    same = replace(full.layout, group=block.layout.group)
    assert torch.equal(same.pack(), block.layout.pack())


def test_links_after_parallel():
    spec = LayoutSpec(num_links=2, placement="parallel")
    prompt = lay_out(PIECES, spec, link_base=LINK_BASE)
    assert prompt.ids == (1, 2, 3, 4, 5, 100, 101, 6, 100, 101, 7, 8, 9)
    assert labels(prompt) == (-100,) * 12 + (9,)
    assert rows(prompt, "kind", "chunk", "offset", "position", "order", "group") == {
        "kind": [1, 1, 2, 2, 2, LINK, LINK, 2, LINK, LINK, 4, 4, 5],
        "chunk": [-1, -1, 0, 0, 0, 0, 0, 1, 1, 1, -1, -1, -1],
        "offset": [0, 1, 0, 1, 2, 0, 1, 0, 0, 1, 0, 1, 0],
        "position": [0, 1, 2, 3, 4, 5, 6, 2, 3, 4, 7, 8, 9],
        "order": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12],
        "group": [-1, -1, 0, 0, 0, -1, -1, 1, -1, -1, -1, -1, -1],
    }


def test_links_before_and_blanks_composite():
    spec = LayoutSpec(num_links=2, link_side="before", num_blanks=2, placement="composite")
    prompt = lay_out(PIECES, spec, link_base=LINK_BASE, blank_id=BLANK_ID)
    assert prompt.ids == (1, 2, 100, 101, 50, 50, 3, 4, 5, 100, 101, 50, 50, 6, 7, 8, 9)
    assert rows(prompt, "kind", "chunk", "offset", "position", "order", "group") == {
        "kind": [1, 1, 3, 3, BLANK, BLANK, 2, 2, 2, 3, 3, BLANK, BLANK, 2, 4, 4, 5],
        "chunk": [-1, -1, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, -1, -1, -1],
        "offset": [0, 1, 0, 1, 0, 1, 0, 1, 2, 0, 1, 0, 1, 0, 0, 1, 0],
        "position": [0, 1, 0, 1, 0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 10, 11, 12],
        "order": [0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 8, 7, 8, 9, 10, 11, 12],
        "group": [-1, -1, -1, -1, 0, 0, 0, 0, 0, -1, -1, 1, 1, 1, -1, -1, -1],
    }


def test_packets():
    """A header and a trailer belong to their chunk: same group, later positions, links outside."""
    spec = LayoutSpec(num_links=1, num_headers=2, num_trailers=1)
    prompt = lay_out(PIECES, spec, link_base=LINK_BASE)
    assert prompt.ids == (1, 2, *(101, 102, 3, 4, 5, 103, 100), *(101, 102, 6, 103, 100), 7, 8, 9)
    assert rows(prompt, "kind", "chunk", "offset", "position", "order", "group") == {
        "kind": [1, 1, WRAP, WRAP, 2, 2, 2, WRAP, LINK, WRAP, WRAP, 2, WRAP, LINK, 4, 4, 5],
        "chunk": [-1, -1, *[0] * 7, *[1] * 5, -1, -1, -1],
        "offset": [0, 1, 0, 1, 0, 1, 2, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0],
        "position": list(range(17)),
        "order": list(range(17)),
        "group": [-1, -1, *[0] * 6, -1, *[1] * 4, -1, -1, -1, -1],
    }
    encoded = prompt.layout.is_encoded[0].nonzero().flatten().tolist()
    assert encoded == [2, 3, 4, 5, 6, 7, 9, 10, 11, 12]
    assert wrapped((3, 4, 5), spec, LINK_BASE) == prompt.ids[2:8]


@pytest.mark.parametrize(
    ("table", "more", "first", "second"),
    [
        ("shared", {}, (100, 100), (100, 100)),
        ("slot", {}, (100, 101), (100, 101)),
        ("chunk", {"max_chunks": 3}, (100, 101), (102, 103)),
    ],
)
def test_link_tables(table, more, first, second):
    spec = LayoutSpec(num_links=2, link_table=table, **more)
    prompt = lay_out(PIECES, spec, link_base=LINK_BASE)
    assert prompt.ids == (1, 2, 3, 4, 5, *first, 6, *second, 7, 8, 9)
    assert spec.num_learned == {"shared": 1, "slot": 2, "chunk": 6}[table]


def test_more_chunks_than_link_rows_are_refused():
    spec = LayoutSpec(num_links=2, link_table="chunk", max_chunks=1)
    with pytest.raises(ValueError, match=r"rows for 1 chunks \(max_chunks\)"):
        lay_out(PIECES, spec, link_base=LINK_BASE)


@pytest.mark.parametrize(
    "values",
    [
        {"num_links": 1, "link_table": "chunk"},
        {"num_links": 1, "max_chunks": 4},
        {"link_table": "chunk", "max_chunks": 4},
    ],
)
def test_max_chunks_goes_with_a_table_by_chunk(values):
    with pytest.raises(ValueError, match="needs max_chunks"):
        LayoutSpec(**values)


def test_shared_prefix():
    prompt = lay_out(PIECES, LayoutSpec(shared_prefix=True))
    assert prompt.ids == (1, 2, 1, 2, 3, 4, 5, 1, 2, 6, 7, 8, 9)
    assert rows(prompt, "kind", "chunk", "offset", "position", "order", "group") == {
        "kind": [1, 1, BLANK, BLANK, 2, 2, 2, BLANK, BLANK, 2, 4, 4, 5],
        "chunk": [-1, -1, 0, 0, 0, 0, 0, 1, 1, 1, -1, -1, -1],
        "offset": [0, 1, 0, 1, 0, 1, 2, 0, 1, 0, 0, 1, 0],
        "position": [0, 1, 0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8],
        "order": [0, 1, 0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8],
        "group": [-1, -1, 0, 0, 0, 0, 0, 1, 1, 1, -1, -1, -1],
    }


def test_blanks_are_seen_by_their_chunk_only():
    layout = lay_out(PIECES, LayoutSpec(shared_prefix=True)).layout
    seen = dense_mask(layout)[0, 0]
    assert seen[9].nonzero()[:, 0].tolist() == [7, 8, 9]  # the token of the second chunk
    assert seen[12].nonzero()[:, 0].tolist() == [0, 1, 4, 5, 6, 9, 10, 11, 12]  # the answer


def test_serving_has_no_labels():
    prompt = lay_out(PIECES._replace(answer=()), LayoutSpec())
    assert labels(prompt) == (-100,) * 8


@pytest.mark.parametrize(
    ("spec", "missing"),
    [
        (LayoutSpec(num_links=1), "link_base"),
        (LayoutSpec(num_headers=1), "link_base"),
        (LayoutSpec(num_blanks=1), "blank_id"),
    ],
)
def test_missing_id_is_refused(spec, missing):
    with pytest.raises(ValueError, match=f"lay_out needs {missing}"):
        lay_out(PIECES, spec)


def test_pack():
    packed = pack([lay_out(SHORT, LayoutSpec()), lay_out(SHORT, LayoutSpec(num_links=1), 100)])
    assert packed.ids == (1, 3, 7, 9, 10, 1, 3, 100, 7, 9, 10)
    assert labels(packed) == (-100, -100, -100, 9, 10, -100, -100, -100, -100, 9, 10)
    assert rows(packed, "kind", "chunk", "position", "order", "group", "sample") == {
        "kind": [1, 2, 4, 5, 5, 1, 2, 3, 4, 5, 5],
        "chunk": [-1, 0, -1, -1, -1, -1, 0, 0, -1, -1, -1],
        "position": [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5],
        "order": [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10],
        "group": [-1, 0, -1, -1, -1, -1, 0, -1, -1, -1, -1],
        "sample": [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1],
    }


def with_fresh_row(pieces: Pieces) -> Prompt:
    """The prompt with its last row superseding row 1."""
    prompt = lay_out(pieces, LayoutSpec())
    supersedes = prompt.layout.supersedes.clone()
    supersedes[0, -1] = 1
    return replace(prompt, layout=replace(prompt.layout, supersedes=supersedes))


def test_pack_moves_superseded_row_numbers():
    packed = pack([lay_out(SHORT, LayoutSpec()), with_fresh_row(SHORT)])
    assert rows(packed, "supersedes")["supersedes"] == [-1] * 9 + [6]


def test_stack_right():
    batch = stack([lay_out(SHORT, LayoutSpec()), lay_out(PIECES, LayoutSpec())], pad_id=0)
    assert batch.input_ids.tolist() == [[1, 3, 7, 9, 10, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6, 7, 8, 9]]
    assert batch.labels.tolist() == [[-100] * 3 + [9, 10] + [-100] * 4, [-100] * 8 + [9]]
    assert batch.layout.kind.tolist()[0] == [1, 2, 4, 5, 5, PAD, PAD, PAD, PAD]
    assert batch.layout.group.tolist()[0] == [-1, 0, -1, -1, -1, -1, -1, -1, -1]
    assert batch.layout.position.tolist()[0] == [0, 1, 2, 3, 4, 0, 0, 0, 0]


def test_bad_stack_and_pack_are_refused():
    with pytest.raises(ValueError, match="stack needs at least one prompt"):
        stack([], pad_id=0)
    with pytest.raises(ValueError, match="pack needs at least one prompt"):
        pack([])


def test_show_marks_what_rows_are():
    tokenizer = build_tokenizer()

    def encode(text):
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    pieces = Pieces(encode("<s>Hi "), (encode("one "), encode("two ")), encode("who?"), (2,))
    spec = LayoutSpec(num_links=2, num_blanks=1)
    text = show(tokenizer, lay_out(pieces, spec, link_base=len(tokenizer), blank_id=0))
    lines = text.splitlines()
    assert [line.partition(":")[0] for line in lines[::2]] == [
        *("[prefix", "[blank 0", "[chunk 0", "[link 0", "[blank 1", "[chunk 1", "[link 1"),
        *("[query", "[answer"),
    ]
    assert lines[1::2] == [
        *("<s>Hi ", "<pad>", "one ", "<link 0><link 1>", "<pad>", "two ", "<link 0><link 1>"),
        *("who?", "</s>"),
    ]
    assert "sees itself" in lines[4]
    assert "sees all before" in lines[6]


def test_a_dropped_bos_is_a_blank_before_each_chunk():
    prompt = lay_out(UNANSWERED, LayoutSpec(bos="drop"), bos_id=BOS)
    assert prompt.ids == (1, 2, BOS, 3, 4, 5, BOS, 6, 7, 8)
    assert rows(prompt, "kind", "position", "order", "group") == {
        "kind": [1, 1, BLANK, 2, 2, 2, BLANK, 2, 4, 4],
        "position": [0, 1, 1, 2, 3, 4, 4, 5, 6, 7],
        "order": [0, 1, 1, 2, 3, 4, 4, 5, 6, 7],
        "group": [-1, -1, 0, 0, 0, 0, 1, 1, -1, -1],
    }


def test_a_kept_bos_is_the_first_token_of_each_chunk():
    spec = LayoutSpec(bos="keep")
    prompt = lay_out(UNANSWERED, spec, bos_id=BOS)
    assert prompt.ids == (1, 2, BOS, 3, 4, 5, BOS, 6, 7, 8)
    assert rows(prompt, "kind", "offset", "position") == {
        "kind": [1, 1, 2, 2, 2, 2, 2, 2, 4, 4],
        "offset": [0, 1, 0, 1, 2, 3, 0, 1, 0, 1],
        "position": list(range(10)),
    }
    assert wrapped((3, 4, 5), spec, None, BOS) == (BOS, 3, 4, 5)


def test_epics_bos_is_also_before_the_question():
    prompt = lay_out(UNANSWERED, LayoutSpec(bos="keep-all"), bos_id=BOS)
    assert prompt.ids == (1, 2, BOS, 3, 4, 5, BOS, 6, BOS, 7, 8)
    assert rows(prompt, "kind", "group", "position") == {
        "kind": [1, 1, 2, 2, 2, 2, 2, 2, 4, 4, 4],
        "group": [-1, -1, 0, 0, 0, 0, 1, 1, -1, -1, -1],
        "position": list(range(11)),
    }


def test_reserved_slots_leave_positions_unused_but_no_order():
    prompt = lay_out(UNANSWERED, LayoutSpec(placement="reserved", slot=4))
    assert rows(prompt, "position", "order") == {
        "position": [0, 1, 2, 3, 4, 6, 10, 11],
        "order": list(range(8)),
    }


def test_a_chunk_of_an_earlier_prompt_follows_its_own_blanks():
    prompt = lay_out(UNANSWERED, LayoutSpec(), contexts=[(), (1, 2, 9, 9, 9, 9, 9)])
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
        ({"bos": "yes"}, "layout: 'bos' must be one of none, drop, keep, keep-all, got 'yes'"),
        ({"bos": "drop", "num_blanks": 2}, "one of num_blanks, .* got num_blanks, bos"),
        ({"bos": "drop", "shared_prefix": True}, "one of num_blanks, .* got shared_prefix, bos"),
        ({"bos": "drop", "block": False}, r"full attention .* none; got bos"),
        ({"placement": "reserved"}, "needs a slot .* got placement 'reserved' and slot 0"),
        ({"slot": 9}, "got placement 'sequential' and slot 9"),
        ({"slot": -1}, "layout: 'slot' must be a whole number, at least 0"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        LayoutSpec(**values)


@pytest.mark.parametrize("bos", ["drop", "keep"])
def test_a_bos_must_be_given(bos):
    with pytest.raises(ValueError, match="lay_out needs bos_id"):
        lay_out(UNANSWERED, LayoutSpec(bos=bos))
