"""What the model card says of an adapter."""

import pytest

from blocktune.adapter import AdapterInfo
from blocktune.hub.card import CardFacts, card, datasets_of, served_by
from blocktune.hub.push import public
from blocktune.methods import build
from blocktune.prompt import LayoutSpec, PromptFormat

SECRET = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("layout", "method"),
    [
        (LayoutSpec(), "block-attention"),
        (LayoutSpec(num_links=3), "kvlink"),
        (LayoutSpec(num_headers=1, num_trailers=1), "turborag"),
        (
            LayoutSpec(num_headers=1, num_trailers=1, placement="composite"),
            "turborag positions=composite",
        ),
        (LayoutSpec(num_headers=1, num_trailers=1, placement="parallel"), "kv-packet"),
        (LayoutSpec(placement="parallel"), "block-attention"),
        (LayoutSpec(num_headers=8, num_trailers=8), "kv-packet"),
        (LayoutSpec(block=False), "full-prefill"),
    ],
)
def test_the_card_names_the_method_that_serves(layout, method):
    assert served_by(layout) == method
    assert build(method).layout_for(layout) == layout


def test_a_layout_that_nothing_serves_is_one_line():
    with pytest.raises(ValueError, match=r"links alone .*, or with num_headers") as caught:
        served_by(LayoutSpec(num_links=1, num_headers=1))
    assert "\n" not in str(caught.value)


def test_markers_from_0_are_turborags():
    layout = LayoutSpec(num_headers=1, num_trailers=1, placement="composite")
    info = AdapterInfo("org/base", "a", "b", layout, PromptFormat())
    text = card("me/mine", info, "org/base", CardFacts(license="mit"), [])
    assert "- turborag\n" in text
    assert "--method 'turborag positions=composite' " in text
    assert '"turborag positions=composite")[0].text' in text


def test_data_sets_are_named_as_the_hub_knows_them():
    parts = [{"source": "musique", "split": "train"}, {"source": "hf:a/b", "mode": "block"}]
    assert datasets_of({"data": {"parts": parts, "seed": 1}}) == {
        "dgslibisey/MuSiQue": "CC BY 4.0",
        "a/b": "see its card",
    }
    assert list(datasets_of({"data": "hf:org/name?split=train"})) == ["org/name"]
    assert datasets_of({"data": "worlds:train?seed=1"}) == datasets_of({}) == {}
    assert datasets_of({"data": "hf:/data/mine"}) == datasets_of({"data": "hf:data/a/b"}) == {}


def test_data_sets_that_only_the_examples_name_are_named_too():
    told = {"data": "out/t.jsonl", "data_sets": {"mandarjoshi/trivia_qa": "not stated"}}
    assert datasets_of(told) == {"mandarjoshi/trivia_qa": "not stated"}
    assert set(datasets_of(told | {"data": "musique"})) == {
        "mandarjoshi/trivia_qa",
        "dgslibisey/MuSiQue",
    }


@pytest.mark.parametrize(
    ("told", "published"),
    [
        ("train --config /home/me/run.yaml --seed 1", "train --config run.yaml --seed 1"),
        ({"data": ["/data/train.jsonl?n=3", 3]}, {"data": ["train.jsonl?n=3", 3]}),
        ("jsonl:/data/x/train.jsonl", "jsonl:train.jsonl"),
        ("recipes/kvlink.yaml", "recipes/kvlink.yaml"),
        ("hf:org/name?split=train", "hf:org/name?split=train"),
        ("https://example.org/a/b", "https://example.org/a/b"),
        (
            {"command": "train --hub_token x --seed 1"},
            {"command": "train --hub_token HIDDEN --seed 1"},
        ),
        ({"command": "train 'a --hub_token x"}, {"command": "train ''\"'\"'a' --hub_token HIDDEN"}),
        (["base@" + SECRET], ["base@HIDDEN"]),
    ],
)
def test_folders_and_secrets_of_this_machine_stay_at_home(told, published):
    assert public(told) == published
