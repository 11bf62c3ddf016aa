"""The table of methods; what each of them keeps is in `test_contract`."""

import subprocess
import sys

import pytest

from blocktune.methods import available, build, describe_method
from blocktune.methods.describe import GROUPS, describe_all
from blocktune.prompt import LayoutSpec


@pytest.mark.parametrize("name", available())
def test_every_method_says_what_it_is(name):
    row = describe_method(name)
    assert row.summary.endswith(".")
    assert 20 < len(row.summary) < 100
    assert row.source.startswith("https://")


def test_everything_that_is_described_has_a_group_and_a_summary():
    found = describe_all()
    assert {entry.group for entry in found} <= GROUPS.keys()
    assert all(entry.summary.endswith(".") for entry in found)


def test_methods_are_listed_without_torch():
    code = (
        "import sys; from blocktune.methods import describe_all; describe_all();"
        "print(*sys.modules.keys() & {'torch', 'transformers', 'numpy'})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_methods_of_the_spine_exist():
    wanted = {"full-prefill", "no-context", "prefix-cache", "naive", "block-attention", "kvlink"}
    assert wanted | {"cacheblend", "epic"} <= set(available())


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "cacheblnd",
            {},
            "'cacheblnd'; did you mean 'cacheblend'. available: a3, agentkvshift, ape, ",
        ),
        ("epic", {"n": 3}, "'epic' takes k, share, .* got unknown n"),
        ("naive", {"k": 3}, "'naive' takes no parameters, got unknown k"),
        ("epic", {"k": -1}, "k must be .* at least 0, got -1"),
        ("epic", {"share": 15}, r"share must be a share .* \[0, 1\], got 15"),
        ("cacheblend", {"ratio": 1.5}, r"ratio must be a share .* \[0, 1\], got 1.5"),
        ("cacheblend", {"check_layer": 0}, "check_layer must be .* at least 1 .* got 0"),
    ],
)
def test_bad_names_and_values_are_refused_when_built(name, parameters, message):
    with pytest.raises(ValueError, match=message):
        build(name, **parameters)


@pytest.mark.parametrize("name", ["cache-craft", "fusionrag", "semsharekv", "ape", "cacheclip"])
def test_a_method_replaces_what_does_not_go_with_its_own_layout(name):
    for trained in (LayoutSpec(placement="reserved", slot=64), LayoutSpec(bos="drop")):
        assert build(name).layout_for(trained).block
    markers = LayoutSpec(placement="reserved", slot=64, num_headers=1)
    assert build("turborag").layout_for(markers).placement == "sequential"


@pytest.mark.parametrize("name", ["cache-craft", "semsharekv"])
def test_chunks_of_full_prompts_are_not_served_as_if_learned_tokens_were_around_them(name):
    with pytest.raises(ValueError, match="reuses chunks of prompts computed in full"):
        build(f"kv-packet + {name}").layout_for(LayoutSpec(num_headers=1))


def test_adapters_are_served_as_they_were_trained():
    linked = LayoutSpec(num_links=2)
    assert build("kvlink").layout_for(linked) == linked
    assert build("kvlink + epic").layout_for(linked) == linked
    with pytest.raises(ValueError, match=r"'epic' does not serve .*compose: 'kvlink \+ epic'"):
        build("epic").layout_for(linked)
    assert build("full-prefill").layout_for(linked) == LayoutSpec(block=False)
    with pytest.raises(ValueError, match=r"'block-attention' needs .* got one with link tokens"):
        build("block-attention").layout_for(linked)
    with pytest.raises(ValueError, match=r"'kvlink' needs .* got one without"):
        build("kvlink").layout_for(LayoutSpec())
