"""Every execution of the rule gives what the stock model gives under the dense mask."""

from dataclasses import replace

import pytest
import torch
from families import EXPERT_FAMILIES, FAMILIES, VOCAB, build, windows
from layouts import LAYOUTS

from blocktune.attention import DensePlan, SplitPlan, attach, dense_mask, make_plan
from blocktune.attention.masks import KEPT_CELLS
from blocktune.layout import FOREVER, LayerRule

TOLERANCE = 1e-5
EXECUTIONS = ("dense", "split", "flex")
ONE_MASK = sorted(LAYOUTS.keys() - {"until"})


def tokens(layout):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(1, VOCAB, layout.kind.shape, generator=generator)


def additive(mask):
    # Eager attention adds a mask; a row that sees nothing must not become NaN.
    mask = mask | ~mask.any(-1, keepdim=True)
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def stock_masks(config, layout, flip=None):
    """The 4-D mask or the dict of masks that the unmodified model takes."""

    def mask(window):
        cells = dense_mask(layout, LayerRule(window=window)).clone()
        if flip is not None:
            cells[flip] = ~cells[flip]
        return additive(cells)

    kinds, each = getattr(config, "layer_types", None), windows(config)
    if kinds and len(set(kinds)) > 1:
        return {kind: mask(window) for kind, window in zip(kinds, each, strict=True)}
    return mask(each[0])


def stock(model, layout, flip=None):
    model.set_attn_implementation("eager")
    masks = stock_masks(model.config, layout, flip)
    return model(tokens(layout), attention_mask=masks, position_ids=layout.position)


def planned(model, layout, execution):
    attach(model)
    plan = make_plan(execution, layout)
    return model(tokens(layout), position_ids=layout.position, plan=plan)


def record_routes(model):
    """A dict that holds, after a forward, the experts each token went to, by router."""
    routes = {}

    def keep(name, output):
        *_, experts = output
        routes[name] = experts

    for name, module in model.named_modules():
        if type(module).__name__.endswith("TopKRouter"):
            module.register_forward_hook(lambda _, __, output, name=name: keep(name, output))
    return routes


def a_visible_cell(layout):
    """A chunk row's view of the token before it: near, so that no window hides it."""
    entry, row = (layout.is_context & (layout.offset > 0)).nonzero()[-1].tolist()
    same = (layout.order[entry] == layout.order[entry, row] - 1) & layout.is_context[entry]
    same &= layout.sample[entry] == layout.sample[entry, row]
    return entry, 0, row, int(same.nonzero()[0])


def difference(one, other, layout):
    return (one - other)[~layout.is_pad].abs().max().item()


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_executions_match_stock_model_with_dense_mask(family):
    model = build(FAMILIES[family]())
    layout = LAYOUTS["everything"]()
    routes = record_routes(model)
    expected = stock(model, layout).logits
    expected_routes = routes.copy()
    assert len(routes) == (model.config.num_hidden_layers if family in EXPERT_FAMILIES else 0)
    flipped = stock(model, layout, flip=a_visible_cell(layout)).logits
    assert difference(flipped, expected, layout) > 10 * TOLERANCE
    real = ~layout.is_pad.flatten()
    for execution in EXECUTIONS:
        got = planned(model, layout, execution).logits
        # A token sent to another expert differs at once, whatever attention did: look there first.
        for name, experts in expected_routes.items():
            assert torch.equal(routes[name][real], experts[real]), (execution, name)
        assert difference(got, expected, layout) < TOLERANCE, execution


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", ONE_MASK)
@torch.no_grad()
def test_executions_match_stock_model_in_every_layout(name, family):
    model, layout = build(FAMILIES[family]()), LAYOUTS[name]()
    expected = stock(model, layout).logits
    flipped = stock(model, layout, flip=a_visible_cell(layout)).logits
    assert difference(flipped, expected, layout) > 10 * TOLERANCE
    for execution in EXECUTIONS:
        got = planned(model, layout, execution).logits
        assert difference(got, expected, layout) < TOLERANCE, execution


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3"])
@torch.no_grad()
def test_executions_match_dense_where_layers_differ_in_their_rows(family):
    """Rows that end at layer 1 need a mask per layer, which no stock model takes."""
    model, layout = build(FAMILIES[family]()), LAYOUTS["until"]()
    expected = planned(model, layout, "dense").logits
    lives = (layout.until > 1) & ~layout.is_pad
    for execution in ("split", "flex"):
        got = planned(model, layout, execution).logits
        assert (got - expected)[lives].abs().max() < TOLERANCE, execution
    forever = replace(layout, until=torch.full_like(layout.until, FOREVER))
    other = planned(model, forever, "split").logits
    assert (other - expected)[lives].abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("kept_cells", [0, KEPT_CELLS], ids=["remade", "kept"])
@pytest.mark.parametrize("name", ["everything", "packed", "until", "dropout"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gpt-oss"])
def test_split_gradients_match_dense(family, name, kept_cells):
    model, layout = build(FAMILIES[family]()), LAYOUTS[name]()
    attach(model)
    weight = torch.randn(*layout.kind.shape, VOCAB, generator=torch.Generator().manual_seed(2))
    weight[layout.is_pad | (layout.until <= 1)] = 0

    def gradients(plan):
        model.zero_grad()
        states = model.get_input_embeddings()(tokens(layout)).detach().requires_grad_()
        out = model(inputs_embeds=states, position_ids=layout.position, plan=plan)
        (out.logits * weight).sum().backward()
        named = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return {"inputs": states.grad, **named}

    expected, got = gradients(DensePlan(layout)), gradients(SplitPlan(layout, kept_cells))
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        # Sums over many rows: the bound is relative to the largest entry.
        error = (got[name] - gradient).abs().max() / gradient.abs().max()
        assert error < 2e-5, name
