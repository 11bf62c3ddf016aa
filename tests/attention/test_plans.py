"""What every plan promises besides equality: no future, no N x N tensor, clear refusals."""

from dataclasses import replace

import pytest
import torch
from families import FAMILIES, HEAD, VOCAB, build
from largest_tensor import LargestTensor
from layouts import LAYOUTS, layout, prompt, random_layout
from transformers import GptOssConfig

from blocktune.attention import (
    DensePlan,
    FlexPlan,
    SplitPlan,
    attach,
    dense_mask,
    kernels,
    make_plan,
)
from blocktune.attention.flex import BLOCK, block_pairs, flex_block_mask
from blocktune.attention.kernels import AttentionParams
from blocktune.attention.masks import KEPT_CELLS
from blocktune.layout import Kind, LayerRule

EXECUTIONS = ("dense", "split", "flex")
KNOBS = AttentionParams(scaling=0.25)


def states(some, heads=4, kv_heads=2, dim=16, seed=0):
    """Query, key and value in the memory order that a model's projections leave them in."""
    draw = torch.Generator().manual_seed(seed)
    batch, rows = some.kind.shape
    shapes = [(batch, rows, h, dim) for h in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=draw).transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("seed", range(12))
@torch.no_grad()
def test_executions_match_dense_on_random_layouts(seed):
    some = random_layout(seed)
    query, key, value = states(some, seed=seed)
    for window in (None, 12, 200):
        for layer in (0, 1):
            rule = LayerRule(layer=layer, window=window)
            lives = ~some.is_pad & (some.until > layer)
            expected = DensePlan(some).attend(query, key, value, rule, KNOBS)
            for plan in (SplitPlan(some), SplitPlan(some, kept_cells=0), FlexPlan(some)):
                got = plan.attend(query, key, value, rule, KNOBS)
                assert got.isfinite().all()
                torch.testing.assert_close(got[lives], expected[lives], rtol=0, atol=1e-5)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_training_in_bfloat16_matches_dense(seed, autocast):
    """On a CPU that is done without the fused kernel, with gradients and padding, in every plan."""
    some = random_layout(seed)
    drawn = states(some, seed=seed)
    lives = ~some.is_pad & (some.until > 0)

    def train(plan, dtype):
        inputs = [tensor.detach().to(dtype).requires_grad_() for tensor in drawn]
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast and plan is not dense):
            out = plan.attend(*inputs, LayerRule(window=200), KNOBS)
        out[lives].float().square().sum().backward()
        return [out[lives].float(), *(tensor.grad.float() for tensor in inputs)]

    dense = DensePlan(some)
    expected = train(dense, torch.float32)
    for kept in (KEPT_CELLS, 0):
        got = train(SplitPlan(some, kept), torch.float32 if autocast else torch.bfloat16)
        for one, other in zip(got, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0.05, atol=0.05 * other.abs().max().item())


def test_training_in_bfloat16_keeps_no_more_scores_than_it_may(monkeypatch):
    some = layout(prompt(0, (40, 40), 8))
    inputs = [tensor.bfloat16().requires_grad_() for tensor in states(some)]
    seen = []
    monkeypatch.setattr(kernels, "_by_products", lambda *a, **k: seen.append(a[0].shape) or a[0])
    for allowed, called in ((1 << 23, True), (1000, False)):
        monkeypatch.setattr(kernels, "FEW_SCORES", allowed)
        seen.clear()
        SplitPlan(some).attend(*inputs, LayerRule(), KNOBS)
        assert bool(seen) == called
    with torch.no_grad():
        monkeypatch.setattr(kernels, "FEW_SCORES", 1 << 23)
        SplitPlan(some).attend(*inputs, LayerRule(), KNOBS)
    assert not seen


@pytest.mark.parametrize("seed", range(40))
def test_block_pairs_never_miss_a_visible_cell(seed):
    some = random_layout(seed)
    for rule in (LayerRule(), LayerRule(layer=1), LayerRule(window=12), LayerRule(1, 150)):
        seen = dense_mask(some, rule)[:, 0].nonzero()
        pairs = block_pairs(some, rule)
        assert pairs[seen[:, 0], seen[:, 1] // BLOCK, seen[:, 2] // BLOCK].all()


def test_block_pairs_leave_other_chunks_out():
    some = layout(prompt(0, (BLOCK,) * 4, BLOCK))
    expected = torch.eye(5, dtype=torch.bool)
    expected[4] = True
    assert torch.equal(block_pairs(some, LayerRule())[0], expected)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mistral", "qwen3-moe"])
@torch.no_grad()
def test_later_tokens_never_change_earlier_rows(family):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # bitwise: the kernels must not divide the work differently
    model = build(FAMILIES[family]())
    attach(model)
    some = LAYOUTS["everything"]()
    ids = torch.randint(1, VOCAB, some.kind.shape)
    real = ~some.is_pad
    later = real & (some.order >= some.order[real].float().quantile(0.7).long())
    changed = torch.where(later, (ids + 1) % VOCAB, ids)
    for execution in EXECUTIONS:
        plan = make_plan(execution, some)
        before, after = (
            model(tokens, position_ids=some.position, plan=plan, use_cache=False).logits
            for tokens in (ids, changed)
        )
        earlier = real & ~later
        assert torch.equal(before[earlier], after[earlier]), execution
        assert not torch.equal(before[later], after[later])
    torch.set_num_threads(threads)


def long_layout(tokens=4096, chunk=256, query=64):
    count = tokens // chunk
    lengths = [chunk] * (count - 1) + [chunk - query - 8]
    return layout(prompt(8, lengths, query))


def attend(plan, some, softcap=None):
    query, key, value = (x.requires_grad_() for x in states(some, heads=2, kv_heads=1, dim=8))
    params = AttentionParams(scaling=0.25, softcap=softcap)
    out = plan.attend(query, key, value, LayerRule(), params)
    out.backward(torch.ones_like(out))


@pytest.mark.parametrize("softcap", [None, 20.0])
def test_split_makes_no_tensor_of_rows_by_rows(softcap):
    some = long_layout()
    rows = some.num_rows
    with LargestTensor() as split:
        attend(SplitPlan(some), some, softcap)
    # 64 query rows and 16 chunks of 256 x 256 scores (softcap), two heads.
    assert split.numel < rows * rows // 4
    with LargestTensor() as dense:
        attend(DensePlan(some), some, softcap)
    assert dense.numel >= rows * rows


def test_flex_block_mask_makes_no_tensor_of_rows_by_rows():
    some = long_layout()
    with LargestTensor() as largest:
        mask = flex_block_mask(some)
    assert largest.numel <= 16 * some.num_rows
    assert mask.shape == (1, 1, some.num_rows, some.num_rows)


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_plan_of_another_layout_is_refused(execution):
    model = build(FAMILIES["llama"]())
    attach(model)
    plan = make_plan(execution, LAYOUTS["ragged"]())
    ids = torch.ones(1, 7, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"made for \(1, 48\).* got \(1, 7\)"):
        model(ids, plan=plan, use_cache=False)


def test_plan_beside_an_attention_mask_is_refused():
    model, some = build(FAMILIES["llama"]()), LAYOUTS["ragged"]()
    attach(model)
    ids, mask = torch.ones_like(some.kind), dense_mask(some)
    with pytest.raises(ValueError, match="leave attention_mask out"):
        model(ids, attention_mask=mask, plan=SplitPlan(some), use_cache=False)


def test_flex_refuses_what_it_cannot_do():
    some = LAYOUTS["ragged"]()
    query, key, value = states(some)
    with pytest.raises(ValueError, match="FlexAttention has no dropout"):
        FlexPlan(some).attend(query, key, value, LayerRule(), AttentionParams(0.25, dropout=0.1))
    with pytest.raises(ValueError, match="no backward on a CPU"):
        FlexPlan(some).attend(query.requires_grad_(), key, value, LayerRule(), KNOBS)


def test_a_batch_of_nothing_but_padding_is_refused():
    some = LAYOUTS["ragged"]()
    empty = replace(some, kind=torch.zeros_like(some.kind))
    with pytest.raises(ValueError, match="all rows are padding"):
        SplitPlan(empty)


def test_unknown_execution_is_named():
    with pytest.raises(ValueError, match="one of dense, flex, split, got 'flash'"):
        make_plan("flash", LAYOUTS["ragged"]())


@torch.no_grad()
def test_a_sink_takes_its_share_of_every_row_once():
    """In eager attention transformers itself adds the sinks, to the mask that is given."""
    model = build(GptOssConfig(**HEAD, num_local_experts=4, attn_implementation="eager"))
    some = LAYOUTS["ragged"]()
    ids = torch.arange(some.kind.numel()).view_as(some.kind) % model.config.vocab_size
    hidden = torch.where(dense_mask(some, LayerRule(0)), 0.0, torch.finfo(torch.float32).min)
    expected = model(ids, position_ids=some.position, attention_mask=hidden).logits
    attach(model)
    made = model(ids, position_ids=some.position, plan=SplitPlan(some), use_cache=False).logits
    real = some.kind != Kind.PAD
    torch.testing.assert_close(made[real], expected[real], rtol=0, atol=1e-5)
