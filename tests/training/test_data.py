"""From examples to the tensors of a step, as literal values."""

from dataclasses import replace

import pytest
import torch
from training.toy import toy_examples, toy_tokenizer

from blocktune.layout import GLOBAL, Kind, Layout
from blocktune.prompt import LayoutSpec, PromptFormat
from blocktune.training.collator import BlockDataCollator
from blocktune.training.dataset import best_fit, in_modes, prepare, to_pieces

PART = {
    "prefix": [9], "chunks": [[11, 12], [13]], "query": [14, 15], "answer": [16, 17],
    "followups": [],
}  # fmt: skip
SHORT = PART | {"chunks": [[11]], "query": [14], "answer": [16]}


def row(*parts: dict) -> dict:
    """A row of the dataset."""
    return {"parts": [{"index": i, "length": 0, **part} for i, part in enumerate(parts)]}


def test_collated_block_batch():
    batch = BlockDataCollator(toy_tokenizer(), LayoutSpec(num_links=1), link_base=100)(
        [row({**PART, "block": True}), row({**SHORT, "block": False})]
    )
    assert batch["input_ids"].tolist() == [
        [9, 11, 12, 100, 13, 100, 14, 15, 16, 17],
        [9, 11, 14, 16, 2, 2, 2, 2, 2, 2],
    ]
    assert batch["labels"].tolist() == [[-100] * 8 + [16, 17], [-100] * 3 + [16] + [-100] * 6]
    layout = Layout.unpack(batch["layout"])
    assert layout.group[0].tolist() == [GLOBAL, 0, 0, GLOBAL, 1, GLOBAL] + [GLOBAL] * 4
    assert layout.group[1].tolist() == [GLOBAL] * 10
    assert layout.position[0].tolist() == list(range(10))
    assert (layout.kind[1] == Kind.PAD).tolist() == [False] * 4 + [True] * 6


def prepared(examples, fmt=None, both=False, block_share=1.0, seed=0, **options):
    samples = in_modes(examples, block_share, both, seed)
    options = {"limit": 500} | options
    read = BlockDataCollator(toy_tokenizer(), LayoutSpec(num_links=2), fmt or PromptFormat()).reader
    return prepare(samples, read, **options)


def parts(dataset) -> list[dict]:
    return [part for record in dataset for part in record["parts"]]


def test_pieces_survive_the_dataset_and_lengths_count_links():
    dataset = prepared(toy_examples(3)).dataset
    for record in dataset:
        pieces = to_pieces(record["parts"][0])
        tokens = sum(map(len, (pieces.prefix, *pieces.chunks, pieces.query, pieces.answer)))
        assert record["length"] == tokens + 2 * 3


def test_every_turn_of_an_example_is_learnt():
    followups = (("Who else?", "Nobody at all"), ("Why?", "It is so"))
    examples = [replace(example, followups=followups) for example in toy_examples(2)]
    prepared_rows = prepared(examples).dataset
    single = prepared(toy_examples(2)).dataset
    collate = BlockDataCollator(toy_tokenizer(), LayoutSpec(num_links=2), link_base=5000)
    for record, alone in zip(prepared_rows, single, strict=True):
        pieces = to_pieces(record["parts"][0])
        learnt = [*pieces.answer, *pieces.followups[0][1], *pieces.followups[1][1]]
        labels = collate([record])["labels"]
        assert labels[labels != -100].tolist() == learnt
        assert record["answer_length"] == len(learnt) > alone["answer_length"]
        turns = sum(len(ids) for turn in pieces.followups for ids in turn)
        assert record["length"] == alone["length"] + turns


def test_long_examples_are_refused_by_name():
    longest = max(prepared(toy_examples(8)).dataset["length"])
    with pytest.raises(ValueError, match=rf"has {longest} tokens, the limit is {longest - 1}"):
        prepared(toy_examples(8), limit=longest - 1)


def test_examples_that_only_a_gap_or_a_packed_row_makes_too_long():
    longest = max(prepared(toy_examples(8)).dataset["length"])
    with pytest.raises(ValueError, match=rf"{longest} tokens, the limit is {longest - 1}"):
        prepared(toy_examples(8), pack_length=longest - 1)
    with pytest.raises(ValueError, match="less 8 for position_jitter"):
        prepared(toy_examples(8), limit=longest + 7, position_gap=2)
    prepared(toy_examples(8), limit=longest + 8, position_gap=2)


def test_long_examples_are_dropped_and_counted():
    lengths = prepared(toy_examples(8)).dataset["length"]
    kept = prepared(toy_examples(8), limit=max(lengths) - 1, drop_long=True)
    assert kept.num_dropped == lengths.count(max(lengths))
    assert len(kept.dataset) == 8 - kept.num_dropped


def test_nothing_left_is_an_error():
    with pytest.raises(
        ValueError, match="no example to train on: of 8 rows, 8 have more than 3 tokens"
    ):
        prepared(toy_examples(8), limit=3, drop_long=True)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 5), (1.0, 20)])
def test_the_block_share_is_exact_and_seeded(share, count):
    chosen = [sample.block for sample in in_modes(toy_examples(20), share, seed=3)]
    assert sum(chosen) == count
    assert chosen == [sample.block for sample in in_modes(toy_examples(20), share, seed=3)]


def test_the_seed_chooses_other_examples():
    halves = [[s.block for s in in_modes(toy_examples(20), 0.5, seed=seed)] for seed in (1, 2)]
    assert halves[0] != halves[1]


def test_both_modes_are_every_example_twice_with_the_tag_of_its_mode():
    fmt = PromptFormat(block_tag="[Block]", full_tag="[Full]")
    made = parts(prepared(toy_examples(3), fmt, both=True).dataset)
    assert [part["block"] for part in made] == [True, False] * 3
    assert [made[i]["query"] for i in (0, 2, 4)] == [made[i]["query"] for i in (1, 3, 5)]
    text = toy_tokenizer().decode(made[0]["prefix"]), toy_tokenizer().decode(made[1]["prefix"])
    assert "[Block] Answer" in text[0]
    assert "[Full] Answer" in text[1]


def test_labels_are_the_response_and_its_end():
    record = prepared(toy_examples(1)).dataset[0]
    batch = BlockDataCollator(toy_tokenizer(), LayoutSpec(num_links=2), link_base=400)([record])
    learnt = batch["labels"][batch["labels"] != -100]
    assert toy_tokenizer().decode(learnt) == "Alder<|end|>"
    assert torch.equal(learnt, batch["input_ids"][batch["labels"] != -100])


def lengths(rows: list[list[dict]]) -> list[list[int]]:
    return [[part["length"] for part in row] for row in rows]


def test_best_fit_takes_the_fullest_row_that_has_room():
    sizes = [{"length": length} for length in (3, 6, 4, 5, 2)]
    # 6, then 5, then 4 beside 6, then 3 beside 5, then 2 beside 5 and 3
    assert lengths(best_fit(sizes, 10)) == [[6, 4], [3, 5, 2]]


def test_packing_loses_nothing_and_never_overfills():
    plain = prepared(toy_examples(30))
    room = 2 * max(plain.dataset["length"])
    packed = prepared(toy_examples(30), pack_length=room)
    assert packed.num_examples == 30 > len(packed.dataset)
    assert max(packed.dataset["length"]) <= room
    assert sum(packed.dataset["length"]) == sum(plain.dataset["length"])
    indices = sorted(part["index"] for part in parts(packed.dataset))
    assert indices == list(range(30))


def test_packed_rows_hold_several_prompts_that_do_not_see_each_other():
    batch = BlockDataCollator(toy_tokenizer())(
        [row({**SHORT, "block": True}, {**PART, "block": False}), row({**SHORT, "block": True})]
    )
    assert batch["input_ids"].tolist()[0] == [9, 11, 14, 16, 9, 11, 12, 13, 14, 15, 16, 17]
    layout = Layout.unpack(batch["layout"])
    assert layout.sample[0].tolist() == [0] * 4 + [1] * 8
    assert layout.position[0].tolist() == [*range(4), *range(8)]


def test_an_example_that_cannot_be_read_is_named():
    examples = toy_examples(3)
    special = PromptFormat(instruction="say <|bos|> twice")
    with pytest.raises(ValueError, match=r"^example 0 \(.*\): BOS .* occurs"):
        prepared(examples, special)


def test_a_teacher_reads_the_plain_prompt_in_full_attention():
    spec = LayoutSpec(num_links=1, num_headers=1)
    collator = BlockDataCollator(toy_tokenizer(), spec, link_base=100, has_teacher=True)
    batch = collator([row({**PART, "block": True, "teacher_prefix": [7, 8]})])
    assert batch["input_ids"].tolist() == [
        [9, 101, 11, 12, 100, 101, 13, 100, 14, 15, 16, 17],
    ]
    assert batch["teacher_input_ids"].tolist() == [[7, 8, 11, 12, 13, 14, 15, 16, 17]]
    assert batch["teacher_labels"].tolist() == [[-100] * 7 + [16, 17]]
    taught = Layout.unpack(batch["teacher_layout"])
    assert taught.group.tolist() == [[GLOBAL] * 9]


def test_rows_are_padded_to_a_multiple_where_each_length_compiles():
    collator = BlockDataCollator(toy_tokenizer(), LayoutSpec(), row_multiple=128)
    plain = replace(collator, row_multiple=1)
    rows = toy_examples(3)
    batch, short = collator(rows), plain(rows)
    width = short["input_ids"].shape[1]
    assert batch["input_ids"].shape[1] == -(-width // 128) * 128 > width
    assert torch.equal(batch["labels"][:, :width], short["labels"])
    assert int(batch["attention_mask"].sum()) == int(short["attention_mask"].sum())


def test_a_chunk_without_a_row_of_the_table_is_found_before_the_run():
    spec = LayoutSpec(num_links=1, link_table="chunk", max_chunks=2)
    read = BlockDataCollator(toy_tokenizer(), spec).reader
    with pytest.raises(ValueError, match=r"^example 1 .*rows for 2 chunks \(max_chunks\)"):
        prepare(in_modes([*toy_examples(1, chunks=2), *toy_examples(1)]), read, limit=500)
    assert prepare(in_modes(toy_examples(1), block_share=0), read, limit=500).num_examples == 1
