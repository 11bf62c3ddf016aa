"""Split and flex attention on the device equal the dense oracle, forward and backward."""

import dataclasses

import pytest
import torch

from blocktune.attention import make_plan
from blocktune.attention.kernels import AttentionParams
from blocktune.layout import LayerRule
from blocktune.prompt import LayoutSpec, Pieces, lay_out

# bfloat16 keeps 8 bits: the output of the kernel and of the oracle may differ in the last one.
# In float32 the kernels sum in another order, over up to 700 keys.
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}


def layout_on(device):
    """Ragged chunks with links, longer than several of flex's 128-row blocks."""
    chunks = tuple((1,) * length for length in (130, 257, 5, 200))
    pieces = Pieces((1,) * 9, chunks, (1,) * 70, (1,) * 3)
    return lay_out(pieces, LayoutSpec(num_links=2), link_base=2).layout.to(device)


def tensors(shape, rows, dtype):
    draw = torch.Generator(shape.device).manual_seed(0)
    dim = shape.hidden // shape.heads
    for heads in (shape.heads, shape.kv_heads, shape.kv_heads):
        size = (1, heads, rows, dim)
        yield torch.randn(size, generator=draw, device=shape.device, dtype=dtype)


@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("execution", ["split", "flex"])
def test_forward_matches_dense(shape, execution, dtype, window):
    layout = layout_on(shape.device)
    qkv = list(tensors(shape, layout.num_rows, getattr(torch, dtype)))
    rule, params = LayerRule(window=window), AttentionParams(scaling=qkv[0].shape[-1] ** -0.5)
    out = make_plan(execution, layout).attend(*qkv, rule, params).float()
    dense = make_plan("dense", layout).attend(*(t.float() for t in qkv), rule, params)
    torch.testing.assert_close(out, dense, rtol=0, atol=TOLERANCE[dtype])


def test_dense_notices_one_flipped_cell(shape):
    layout = layout_on(shape.device)
    qkv, params = list(tensors(shape, layout.num_rows, torch.float32)), AttentionParams(scaling=0.2)
    order = layout.order.clone()
    order[0, 300] += 1  # this row now sees the next one; all else stays as it was
    flipped = dataclasses.replace(layout, order=order)
    dense, wrong = (
        make_plan("dense", rows).attend(*qkv, LayerRule(), params) for rows in (layout, flipped)
    )
    assert (wrong - dense).abs().max() > 10 * TOLERANCE["float32"]


def test_backward_matches_dense(shape):
    layout = layout_on(shape.device)
    params = AttentionParams(scaling=0.2)

    def gradients(execution):
        qkv = [t.requires_grad_() for t in tensors(shape, layout.num_rows, torch.float32)]
        out = make_plan(execution, layout).attend(*qkv, LayerRule(), params)
        weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
        return torch.autograd.grad((out * weight).sum(), qkv)

    oracle = gradients("dense")
    for execution in ("split", "flex") if shape.device == "cuda" else ("split",):
        for found, expected in zip(gradients(execution), oracle, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
