"""What the model card says of an adapter."""

import pytest

from blocktune.hub.card import datasets_of, served_by
from blocktune.hub.files import public
from blocktune.prompt import LayoutSpec


@pytest.mark.parametrize(
    ("layout", "method"),
    [
        (LayoutSpec(), "block-attention"),
        (LayoutSpec(num_links=3), "kvlink"),
        (LayoutSpec(block=False), "full-prefill"),
    ],
)
def test_the_card_names_the_method_that_serves(layout, method):
    assert served_by(layout) == method


def test_data_sets_are_named_as_the_hub_knows_them():
    data = ["hf:dgslibisey/MuSiQue?split=train", "worlds:train", {"data": "hf:a/b"}]
    assert datasets_of({"data": data}) == ["dgslibisey/MuSiQue", "a/b"]
    assert datasets_of({}) == []


@pytest.mark.parametrize(
    ("told", "published"),
    [
        ("train --config /home/me/run.yaml --seed 1", "train --config run.yaml --seed 1"),
        ({"data": ["/data/train.jsonl?n=3", 3]}, {"data": ["train.jsonl?n=3", 3]}),
        ("jsonl:/data/x/train.jsonl", "jsonl:train.jsonl"),
        ("recipes/kvlink.yaml", "recipes/kvlink.yaml"),
        ("hf:org/name?split=train", "hf:org/name?split=train"),
        ("https://example.org/a/b", "https://example.org/a/b"),
    ],
)
def test_folders_of_this_machine_stay_at_home(told, published):
    assert public(told) == published
