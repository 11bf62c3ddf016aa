"""From examples to the tensors of a step, as literal values."""

import pytest
import torch
from training.toy import toy_examples, toy_tokenizer

from blocktune.layout import GLOBAL, Kind, Layout
from blocktune.prompt import LayoutSpec, PromptFormat
from blocktune.training.collator import BlockCollator
from blocktune.training.dataset import prepare, to_pieces

RECORD = {"prefix": [9], "chunks": [[11, 12], [13]], "query": [14, 15], "answer": [16, 17]}
SHORT = {"prefix": [9], "chunks": [[11]], "query": [14], "answer": [16]}


def test_collated_block_batch():
    batch = BlockCollator(LayoutSpec(num_links=1), pad_id=2, link_base=100)(
        [{**RECORD, "block": True}, {**SHORT, "block": False}]
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


def prepared(examples, **options):
    options = {"limit": 500} | options
    return prepare(examples, toy_tokenizer(), PromptFormat(), LayoutSpec(num_links=2), **options)


def test_pieces_survive_the_dataset_and_lengths_count_links():
    dataset = prepared(toy_examples(3)).dataset
    for record in dataset:
        pieces = to_pieces(record)
        tokens = sum(map(len, (pieces.prefix, *pieces.chunks, pieces.query, pieces.answer)))
        assert record["length"] == tokens + 2 * 3


def test_long_examples_are_refused_by_name():
    longest = max(prepared(toy_examples(8)).dataset["length"])
    with pytest.raises(ValueError, match=rf"has {longest} tokens, the limit is {longest - 1}"):
        prepared(toy_examples(8), limit=longest - 1)


def test_long_examples_are_dropped_and_counted():
    lengths = prepared(toy_examples(8)).dataset["length"]
    kept = prepared(toy_examples(8), limit=max(lengths) - 1, drop_long=True)
    assert kept.num_dropped == lengths.count(max(lengths))
    assert len(kept.dataset) == 8 - kept.num_dropped


def test_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="no example to train on: 8 came, 8 had more than 3"):
        prepared(toy_examples(8), limit=3, drop_long=True)


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.25, 5), (1.0, 20)])
def test_the_block_share_is_exact_and_seeded(share, count):
    chosen = prepared(toy_examples(20), block_share=share, seed=3).dataset["block"]
    assert sum(chosen) == count
    assert chosen == prepared(toy_examples(20), block_share=share, seed=3).dataset["block"]


def test_the_seed_chooses_other_examples():
    halves = [prepared(toy_examples(20), block_share=0.5, seed=s).dataset["block"] for s in (1, 2)]
    assert halves[0] != halves[1]


def test_labels_are_the_response_and_its_end():
    record = prepared(toy_examples(1)).dataset[0]
    batch = BlockCollator(LayoutSpec(num_links=2), 2, 400)([record])
    learnt = batch["labels"][batch["labels"] != -100]
    assert toy_tokenizer().decode(learnt) == "Alder<|end|>"
    assert torch.equal(learnt, batch["input_ids"][batch["labels"] != -100])
