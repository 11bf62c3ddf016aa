"""Methods put together: as one says them, in YAML and in Python."""

import inspect

import pytest
from engine.served import ASK

from blocktune.methods import (
    Axis,
    Composition,
    Method,
    Weights,
    build,
    build_entry,
    compose,
    parse_method,
)
from blocktune.methods.repair import MeanShift
from blocktune.methods.reshape import ScaledContext
from blocktune.methods.select import Deviation, FirstK, Nothing
from blocktune.prompt import LayoutSpec
from blocktune.testing import small_engine


@pytest.mark.parametrize(
    ("text", "selection", "weights"),
    [
        ("block-attention + deviation 15 %", Deviation(ratio=0.15), Weights.BLOCK),
        ("kvlink + epic", FirstK(k=16), Weights.LINKS),
        ("kvlink + epic 8", FirstK(k=8), Weights.LINKS),
        ("epic 15%", FirstK(share=0.15), Weights.ANY),
        ("naive + deviation 0.3 check_layer=2", Deviation(0.3, 2), Weights.ANY),
        ("naive  +  first-k k=4", FirstK(k=4), Weights.ANY),
    ],
)
def test_a_method_is_what_one_says(text, selection, weights):
    method = build(text)
    assert (method.select(), method.weights) == (selection, weights)
    assert method.name == " ".join(text.split())


def test_presets_that_decide_other_axes_add_up():
    method = build("kvlink + link0 + scaled-context 0.8 + mean-shift + deviation 30 %")
    trained = LayoutSpec(num_links=2)
    assert method.layout_for(trained).num_links == 2
    assert method.layout_for(trained).num_blanks == build("link0").layout(trained).num_blanks
    assert method.reshape() == ScaledContext(temperature=0.8)
    assert method.repair() == MeanShift()
    assert method.axes == frozenset(Axis)


def test_presets_that_decide_different_fields_of_the_layout_add_up_in_any_order():
    for text in ("turborag positions=composite + link0", "link0 + turborag positions=composite"):
        spec = build(text).layout(LayoutSpec())
        assert (spec.placement, spec.num_blanks) == ("composite", 1)
    choice = {"placement": "parallel", "shared_prefix": False, "num_blanks": 2}
    assert compose("link0", "ape", layout=choice).layout(LayoutSpec()).num_blanks == 2


def test_yaml_and_python_say_the_same():
    entry = {"name": "mine", "preset": "block-attention", "select": {"deviation": {"ratio": 0.3}}}
    made = compose("block-attention", select=Deviation(ratio=0.3), name="mine")
    assert build_entry(entry) == made
    assert (
        parse_method(
            '{"name": "mine", "preset": "block-attention", "select": {"deviation": {"ratio": 0.3}}}'
        )
        == made
    )
    assert compose("block-attention", select={"deviation": {"ratio": 0.3}}, name="mine") == made
    assert compose("epic", budget=0.2).select() == FirstK(share=0.2)


def test_a_composition_is_named_as_one_would_write_it():
    method = compose(
        build("epic", k=4), "link0", reshape="scaled-context", layout={"placement": "parallel"}
    )
    assert method.name == "epic k=4 + link0 + layout placement=parallel + scaled-context"
    assert build(method.name).select() == method.select()
    assert compose(build("kvlink + epic 4"), reshape=None).name == ("kvlink + epic 4 + no reshape")


@pytest.mark.parametrize(
    ("method", "field"),
    [
        ("cache-craft + layout bos=keep", "bos"),
        ("semsharekv + layout bos=keep-all", "bos"),
        ("cache-craft + layout num_blanks=2", "num_blanks"),
        ("fusionrag + layout shared_prefix=true", "shared_prefix"),
    ],
)
def test_nothing_more_comes_before_chunks_of_earlier_prompts(method, field):
    with pytest.raises(ValueError, match=f"decides itself .* leave out layout {field}$"):
        build(method).layout_for(None)
    assert build("fusionrag + layout bos=keep").layout_for(None).keeps_bos  # stored with the chunk


def test_a_layer_budget_stays_in_a_larger_composition():
    half = compose("cacheblend", layer_budget=0.5)
    larger = compose(half, "ape")
    assert larger.layer_budget == 0.5
    assert larger.name == "cacheblend at 50.0% of the layer-tokens + ape"
    assert larger.select_for(4) == half.select_for(4)
    assert compose(half, layer_budget=0.4).layer_budget == 0.4
    for other in (compose(half, budget=0.1), compose(half, select="first-k")):
        assert other.layer_budget is None


def test_null_is_plain_reuse_on_that_axis():
    psr = build_entry({"name": "x", "preset": "psr", "select": None, "reshape": None})
    assert psr.select() == Nothing()
    assert psr.reshape() is None
    assert psr.layout(LayoutSpec()) == build("psr").layout(LayoutSpec())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("naive + nope", "unknown reuse method 'nope'; available: "),
        ("deviation 15 %", "'deviation' is a selector; start with a preset: 'naive \\+ deviation"),
        ("kvlink + epic + cacheblend", "'epic' and 'cacheblend' both decide the axis 'select'"),
        ("naive + epic + first-k + deviation", "decides 'select' twice"),
        ("block-attention + kvlink", "trained for 'block attention' and 'link tokens' at once"),
        ("full-prefill + deviation 15 %", "'full-prefill' takes no chunk from a cache"),
        ("naive + scaled-context 15 %", "a reshape takes no budget"),
        ("naive + deviation 15 % ratio=0.3", "its budget twice; drop 'ratio' or the percentage"),
        ("cacheblend 15 % ratio=0.3", "its budget twice; drop 'ratio' or the percentage"),
        ("naive + nothing 15 %", "selector 'nothing' takes no budget"),
        ("naive + deviation 150 %", r"ratio must be a share .* got 1.5"),
        ("naive + deviation rato=1", "'deviation' takes ratio, .* got unknown rato"),
        ("link0 + ape", "'link0' and 'ape' both decide the axis 'layout'; drop one, or choose"),
        ("turborag positions=composite + fusionrag", "'turborag' and 'fusionrag' both decide"),
        ("naive + layout 15 % num_blanks=2", "a layout takes no budget; drop the '%'"),
        ("epic 15 % k=8", "its budget twice; drop 'k' or the percentage"),
        ("naive + first-k 15 % last=8", "its budget twice; drop 'last' or the percentage"),
        ("naive + layout num_links=3", "layout: cannot set 'num_links' of a method; known: "),
        ("naive + layout placement=up", "layout: 'placement' must be one of sequential, parallel"),
        ("naive 3", "'naive' takes no parameters, got 'naive 3'"),
        ("naive + ", "cannot read '' as part of a method"),
        ("naive+epic", "cannot read 'naive.epic' as part .* with spaces around"),
        ("{preset: epic, budgt: 0.15}", "unknown key 'budgt'; known: name, preset, params"),
        ("{preset: epic, select: {deviation: 3}}", "is written as .* got .'deviation': 3}"),
        ("{preset: epic, select: 3}", "a selector is written as .* got 3"),
        ("kvlink + mean-shift", "'nothing' recomputes all or none; add a selector"),
        ("droidspeak + mean-shift", "'layer-range' recomputes all or none; add a selector"),
        ("{preset: epic, repair: [mean-shift]}", "a repair is written as .* got .'mean-shift'"),
        ("{preset: epic, layout: 3}", "layout: must be a mapping of keys to values, got 3"),
        ("{preset: epic, params: 3}", "'epic': params: must be a mapping"),
        ("{preset: epic, params: {1: 2}}", "'epic' takes k, .* got unknown 1"),
        ("{preset: epic, select: {5: {k: 2}}}", "unknown selector '5'; available: "),
        ("{preset: epic, select: {first-k: {1: 2}}}", "'first-k' takes k, .* got unknown 1"),
        ("naive + deviation by=[keys,values]", "'deviation': 'by' must be text, got .'keys', "),
        ("turborag positions=[composite]", "'turborag': 'positions' must be text, got"),
        ("random seed=x", "'random': 'seed' must be a whole number, got 'x'"),
        ("cacheblend-repo sees_future=maybe", "'sees_future' must be true or false, got 'maybe'"),
        ("epic 8 k=9", "'epic': 'k' is given 2 times; give it once"),
        ("{1: 2}", "unknown key '1'"),
        ("{preset: epic", "--method: not YAML"),
        ("{select: deviation}", "a method needs a 'name' or a 'preset'"),
    ],
)
def test_mistakes_are_one_clear_line(text, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_method(text)
    assert "\n" not in str(caught.value)


def test_links_are_never_served_in_silence():
    engine = small_engine(Weights.LINKS)
    wanted = r"'epic' does not serve link tokens.* 'kvlink', .* 'kvlink \+ epic'"
    with pytest.raises(ValueError, match=wanted):
        engine.next_logits([ASK], "epic")
    few, all_of_them = (
        engine.next_logits([ASK], "kvlink"),
        engine.next_logits([ASK], "kvlink + epic"),
    )
    assert not few.equal(all_of_them)


def test_a_composition_passes_on_everything_that_a_method_says():
    said = {name for name in vars(Method) if not name.startswith("_")}
    said |= set(inspect.get_annotations(Method))
    said -= {"layout_for", "select_for", "reuses_chunks"}  # made of the others
    # Methods that reuse no chunks compose with nothing.
    said -= {"prefixes", "cached", "keeps_context"}
    assert said <= set(vars(Composition)) | set(inspect.get_annotations(Composition))
