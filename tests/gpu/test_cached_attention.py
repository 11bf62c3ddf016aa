"""Attention over caches takes a fused kernel on the device, and gives what plain attention does."""

import pytest
import torch
from measure import random_example, word_tokenizer
from torch.nn.attention import SDPBackend, sdpa_kernel

from blocktune.attention.cached import CachePlan
from blocktune.attention.kernels import AttentionParams, plain_attention
from blocktune.engine import Engine
from blocktune.layout import Kind, LayerRule
from blocktune.methods import compose
from blocktune.prompt import LayoutSpec, Pieces, lay_out

FUSED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2}
WHICH = {"few": slice(3, None, 7), "tail": slice(40, None), "one": slice(-1, None)}


@pytest.mark.parametrize("which", WHICH)
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_cached_rows_attend_by_a_fused_kernel(shape, dtype, window, which):
    pieces = Pieces((1,) * 9, ((1,) * 300, (1,) * 211), (1,) * 30)
    columns = lay_out(pieces, LayoutSpec(block=False)).layout.to(shape.device).rows()
    query = columns.map(lambda field: field[:, WHICH[which]])
    draw = torch.Generator(shape.device).manual_seed(0)
    kind, dim = getattr(torch, dtype), shape.hidden // shape.heads
    q, k, v = (
        torch.randn(1, h, rows.kind.shape[1], dim, generator=draw, device=shape.device, dtype=kind)
        for h, rows in ((shape.heads, query), (shape.kv_heads, columns), (shape.kv_heads, columns))
    )
    params = AttentionParams(scaling=dim**-0.5)
    with sdpa_kernel(FUSED):  # raises where none of them can, instead of taking the slow one
        out = CachePlan(query, columns).attend(q, k, v, LayerRule(window=window), params)
    back = query.order[..., None] - columns.order[:, None]
    mask = (back >= 0) & (back < (window or back.numel()))
    expected = plain_attention(q.float(), k.float(), v.float(), mask[:, None], params)
    torch.testing.assert_close(out.float(), expected.transpose(1, 2), rtol=0, atol=TOLERANCE[dtype])
    assert (columns.kind != Kind.PAD).all()


@torch.no_grad()
def test_a_neutral_reshape_changes_no_more_than_rounding(shape):
    engine = Engine(shape.model(), word_tokenizer(shape.vocabulary))
    example = random_example(shape)
    neutral = {"scaled-context": {"temperature": 1.0, "scale": 1.0}}
    plain = engine.next_logits([example], "epic").float()
    same = engine.next_logits([example], compose("epic", reshape=neutral)).float()
    scaled = engine.next_logits([example], compose("epic", reshape="scaled-context")).float()
    # Scores are kept in float32 by one and rounded to the model's dtype inside the other's kernel.
    tolerance = 1e-4 if shape.dtype == "float32" else 0.1
    assert (same - plain).abs().max() < tolerance
    assert not scaled.equal(plain)
