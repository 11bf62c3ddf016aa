"""The table of methods, and the contract that every one in it keeps."""

import pytest
from engine.served import Ask, engine_of
from families import FAMILIES
from tiny_tokenizer import build_tokenizer

from blocktune.prompt import Chunk, LayoutSpec, PromptFormat
from blocktune.reuse import Weights, available, build, describe


def untuned() -> list[str]:
    return [name for name in available() if build(name).weights is Weights.ANY]


@pytest.fixture(scope="module")
def bare():
    """No template, no BOS, no instruction: a chunk is the first thing there is."""
    tokenizer = build_tokenizer(None, bos_token=None)
    words = PromptFormat(instruction="", question="Question: {question}")
    return engine_of(FAMILIES["llama"](), tokenizer, words)


@pytest.mark.parametrize("name", untuned())
def test_one_chunk_alone_matches_full_prefill_or_says_it_does_not(bare, name):
    ask = Ask("Who directed it?", (Chunk("The film Frozen Shore was directed by Noel Fisher."),))
    full = bare.next_logits([ask], "full-prefill")
    difference = (bare.next_logits([ask], name) - full).abs().max()
    assert (difference < 1e-5) == build(name).exact_on_one_chunk


def test_the_declared_exceptions_are_these():
    # Links, wraps and blanks, other positions, scaled attention; and an answer without chunks.
    changed = {"kvlink", "kv-packet", "turborag", "link0", "s", "prompt-cache-schema"}
    changed |= {"ape", "s+p", "psr", "p+s+r", "no-context"}
    assert {n for n in available() if not build(n).exact_on_one_chunk} == changed


@pytest.mark.parametrize("name", available())
def test_every_method_says_what_it_is(name):
    row = describe(name)
    assert row.summary.endswith(".")
    assert 20 < len(row.summary) < 100
    assert row.source.startswith("https://")


def test_the_methods_of_the_spine_exist():
    wanted = {"full-prefill", "no-context", "prefix-cache", "naive", "block-attention", "kvlink"}
    assert wanted | {"cacheblend", "epic"} <= set(available())


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("cacheblnd", {}, "unknown reuse method 'cacheblnd'; available: block-attention, "),
        ("epic", {"n": 3}, "'epic' takes k, share, got unknown n"),
        ("naive", {"k": 3}, "'naive' takes no parameters, got unknown k"),
        ("epic", {"k": -1}, "k must be a number of tokens per chunk, at least 0, got -1"),
        ("epic", {"share": 15}, r"share must be a share .* \[0, 1\], got 15"),
        ("cacheblend", {"ratio": 1.5}, r"ratio must be a share .* \[0, 1\], got 1.5"),
        ("cacheblend", {"check_layer": 0}, "check_layer must be a layer from 1 on .* got 0"),
    ],
)
def test_bad_names_and_values_are_refused_when_built(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        build(name, **parameters)


def test_adapters_are_served_as_they_were_trained():
    linked = LayoutSpec(num_links=2)
    assert build("kvlink").layout(linked) == linked
    assert build("epic").layout(linked) == linked
    assert build("full-prefill").layout(linked) == LayoutSpec(block=False)
    with pytest.raises(ValueError, match=r"'block-attention' needs .* got one with link tokens"):
        build("block-attention").layout(linked)
    with pytest.raises(ValueError, match=r"'kvlink' needs .* got one without"):
        build("kvlink").layout(LayoutSpec())
