"""The rule of visibility, cell by cell, on layouts small enough to draw."""

from dataclasses import replace

import pytest
import torch
from layouts import LAYOUTS, freshen, layout, packed, prompt

from blocktune.attention import dense_mask
from blocktune.layout import FOREVER, LayerRule, Layout


def drawn(some: Layout, rule: LayerRule | None = None) -> list[str]:
    """One string a row: ``#`` where it sees the column's row."""
    cells = dense_mask(some, rule or LayerRule())[0, 0].tolist()
    return ["".join(".#"[cell] for cell in row) for row in cells]


def test_chunks_see_themselves_and_the_query_sees_all():
    assert drawn(layout(prompt(1, (2, 2), 2))) == [
        "#......",
        ".#.....",
        ".##....",
        "...#...",
        "...##..",
        "######.",
        "#######",
    ]


def test_links_see_everything_before_them_and_only_global_rows_see_them():
    assert drawn(layout(prompt(0, (1, 1), 1, links=1))) == [
        "#....",
        "##...",
        "..#..",
        "####.",
        "#####",
    ]


def test_blanks_are_seen_by_their_own_chunk_alone():
    assert drawn(layout(prompt(0, (1, 1), 1, blanks=1))) == [
        "#....",
        "##...",
        "..#..",
        "..##.",
        ".#.##",
    ]


def test_fresh_row_replaces_its_original_for_global_rows_only():
    # Rows: chunk 0 (two tokens), chunk 1 (two tokens), query, and a fresh row of token 2.
    assert drawn(layout(freshen(prompt(0, (2, 2), 1), [2]))) == [
        "#.....",
        "##....",
        "..#...",
        "..##..",
        "##.###",
        "##...#",
    ]


def test_fresh_row_that_ended_gives_its_place_back():
    some = layout(freshen(prompt(0, (2,), 1), [0], until=1))
    assert drawn(some, LayerRule(layer=0)) == ["#...", "##..", ".###", "...#"]
    assert drawn(some, LayerRule(layer=1)) == ["#...", "##..", "###.", "...."]
    assert some.endings == (1,)
    assert some.superseded_until.tolist() == [[1, 0, 0, 0]]


def test_window_counts_tokens_of_the_order():
    assert drawn(layout(prompt(0, (1, 1), 3, parallel=True)), LayerRule(window=2)) == [
        "#....",
        ".#...",
        ".##..",
        "..##.",
        "...##",
    ]


def test_packed_prompts_and_padding_never_meet():
    some = layout(packed(prompt(0, (1,), 1), prompt(0, (1,), 1)), prompt(0, (1,), 1), left=True)
    assert drawn(some) == ["#...", "##..", "..#.", "..##"]
    assert drawn(Layout.unpack(some.pack()[1:])) == ["....", "....", "..#.", "..##"]


def test_block_dropout_lets_merged_chunks_see_each_other():
    some = layout(prompt(0, (1, 1, 1), 1, groups=(0, 1, 0)))
    assert drawn(some) == ["#...", ".#..", "#.#.", "####"]


def test_position_plays_no_part():
    some = LAYOUTS["everything"]()
    moved = replace(some, position=torch.randint(0, 1000, some.position.shape))
    assert torch.equal(dense_mask(moved), dense_mask(some))


@pytest.mark.parametrize("name", LAYOUTS)
def test_pack_and_unpack_keep_every_field(name):
    some = LAYOUTS[name]()
    assert torch.equal(Layout.unpack(some.pack()).pack(), some.pack())


def test_counts_of_context_leave_fresh_rows_and_blanks_out():
    some = layout(freshen(prompt(2, (3, 4), 2, links=1, blanks=2), [5, 6]))
    assert int(some.is_context.sum()) == 7
    assert int(some.is_fresh.sum()) == 2
    assert some.num_rows == 2 + 3 + 4 + 2 + 2 * 1 + 2 * 2 + 2


def test_superseded_until_takes_the_longest_life():
    rows = freshen(freshen(prompt(0, (2,), 1), [0, 1], until=1), [1])
    assert layout(rows).superseded_until.tolist() == [[1, FOREVER, 0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"order": torch.zeros(1, 3, dtype=torch.int64)}, r"'order' is \(1, 3\) torch.int64"),
        ({"group": torch.zeros(1, 4)}, r"'group' is \(1, 4\) torch.float32"),
        ({"kind": torch.zeros(4, dtype=torch.int64)}, r"'kind' is \(4,\)"),
    ],
)
def test_fields_that_do_not_fit_are_named(change, message):
    some = layout(prompt(0, (2, 1), 1))
    with pytest.raises(ValueError, match=message):
        replace(some, **change)
