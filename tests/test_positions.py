"""Keys move exactly: over all supported rotations, and never where they cannot."""

import sys

import pytest
import torch
from families import ROPES, VOCAB, build
from layouts import layout, prompt
from transformers import DynamicCache

from blocktune.attention import SplitPlan, attach
from blocktune.models.gate import require_supported
from blocktune.positions import (
    LayerRope,
    Rotation,
    load_fused,
    place,
    relocate_keys,
    relocation,
    rotate_keys,
)
from blocktune.positions.fused import rotate_into

SHIFTS = [1, -3, 1000, 30_000]


def angle_bound(position, inv_freq):
    """Bound for keys of a few units at ``position``.

    A float32 angle of ``a`` radians is rounded by up to ``a * 2**-24``, in the moved key and in
    the one it is compared with, and the keys multiply that.
    """
    return 2e-6 + 6e-7 * abs(position) * inv_freq.max().item()


def rotated(model, layer, positions):
    """Keys that a layer itself makes of one token, alone, at each of ``positions``."""
    cache, position = DynamicCache(), torch.tensor(positions)[:, None]
    options = {"position_ids": position, "attention_mask": torch.ones_like(position)}
    with torch.no_grad():
        model(torch.full_like(position, 5), past_key_values=cache, **options)
    return cache.layers[layer].keys.permute(2, 1, 0, 3)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", ROPES)
def test_relocated_key_matches_rope_at_the_new_position(name, shift):
    model = build(ROPES[name]())
    spec = require_supported(model)
    for layer, form in enumerate(spec.layers):
        inv_freq = form.inv_freq
        old = [5, 6, 19, 40]
        keys = rotated(model, layer, old)
        expected = rotated(model, layer, [position + shift for position in old])
        moved = relocate_keys(keys, torch.full((1, 4), shift), form)
        torch.testing.assert_close(moved, expected, rtol=0, atol=angle_bound(shift, inv_freq))
        off_by_one = relocate_keys(keys, torch.full((1, 4), shift + 1), form)
        assert (off_by_one - expected).abs().max() > 10 * angle_bound(shift, inv_freq)


def test_yarn_scaling_does_not_enter_twice():
    model = build(ROPES["yarn"]())
    assert model.model.rotary_emb.attention_scaling > 1.1
    keys = rotated(model, 0, [0, 7])
    form = require_supported(model).layers[0]
    moved = relocate_keys(keys, torch.full((1, 2), 50), form)
    torch.testing.assert_close(moved.norm(dim=-1), keys.norm(dim=-1))


def test_partial_rotary_leaves_the_other_dimensions_alone():
    model = build(ROPES["partial"]())
    form = require_supported(model).layers[0]
    keys = torch.randn(1, 2, 3, 8)
    moved = relocate_keys(keys, torch.tensor([[4, -2, 9]]), form)
    assert len(form.inv_freq) == 2
    assert torch.equal(moved[..., 4:], keys[..., 4:])
    assert not torch.isclose(moved[..., :4], keys[..., :4]).all()


def test_bfloat16_keys_are_moved_in_float32():
    form = require_supported(build(ROPES["default"]())).layers[0]
    keys = torch.randn(1, 2, 4, 8).bfloat16()
    shift = torch.tensor([[257, 4099, -513, 30_001]])
    moved = relocate_keys(keys, shift, form)
    expected = relocate_keys(keys.float(), shift, form)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, expected.bfloat16())  # one rounding, at the end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["default", "partial"])
def test_keys_turned_into_place_are_the_relocated_ones(name, dtype):
    form = require_supported(build(ROPES[name]())).layers[0]
    keys = torch.randn(1, 2, 5, 8).to(dtype)
    shift = torch.tensor([[4, -2, 9, 0, 300]])
    store = torch.zeros(1, 2, 9, 8, dtype=dtype)
    rotate_keys(keys[:, :, 1:4], Rotation.of(shift[:, 1:4], form), store[:, :, 2:5])
    expected = relocate_keys(keys, shift, form)[:, :, 1:4]
    torch.testing.assert_close(store[:, :, 2:5], expected, rtol=0, atol=1e-6)
    assert not store[:, :, :2].any()
    assert not store[:, :, 5:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("dim", "pairs", "start"), [(64, 32, 0), (64, 8, 0), (48, 16, 16), (6, 2, 1)]
)
@pytest.mark.parametrize("alike", [True, False])
def test_keys_turned_in_one_pass_are_those_of_torch_bit_by_bit(dtype, dim, pairs, start, alike):
    keys = torch.randn(3, 37, dim).to(dtype)
    shift = torch.randint(-99, 9999, (1, 1 if alike else 35))
    turn = Rotation.of(shift, LayerRope(torch.rand(pairs), start))
    turn = turn._replace(cos=turn.cos[0], sin=turn.sin[0])
    one, two = torch.zeros(2, 3, 50, dim, dtype=dtype)
    assert rotate_into(keys[:, 2:], turn, one[:, 9:44])
    relocation._fused, held = None, relocation._fused
    rotate_keys(keys[:, 2:], turn, two[:, 9:44])
    relocation._fused = held
    assert torch.equal(one, two)
    assert not torch.equal(one[:, 9:44], keys[:, 2:])


def test_forms_that_one_pass_does_not_know_are_left_to_torch():
    turn = Rotation(torch.ones(1, 1, 4), torch.zeros(1, 1, 4))
    keys = torch.randn(2, 3, 8)
    for other in (
        keys.half(),
        keys.double(),
        keys.mT.contiguous().mT,
        keys.clone().requires_grad_(),
    ):
        assert not rotate_into(other, turn, torch.zeros(2, 3, 8, dtype=other.dtype))
    assert not rotate_into(keys, turn._replace(interleaved=True), torch.zeros(2, 3, 8))


def test_without_numba_torch_rotates(monkeypatch):
    monkeypatch.setitem(sys.modules, "blocktune.positions.fused", None)
    monkeypatch.setattr(relocation, "_fused", None)
    load_fused()
    assert relocation._fused is None
    monkeypatch.undo()
    load_fused()
    assert relocation._fused is rotate_into


def test_shift_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(batch, tokens\) = \(1, 3\).* got \(3,\)"):
        relocate_keys(torch.zeros(1, 2, 3, 8), torch.zeros(3), LayerRope(torch.ones(4)))


@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_chunkwise_prefill_matches_one_forward(name):
    """Chunks encoded alone at position 0, moved to their places, then the query over them."""
    config = ROPES[name]()
    if getattr(config, "sliding_window", None):
        config.sliding_window = 512  # wider than the prompt: a chunk alone cannot be windowed
    model = build(config)
    lengths, query = (20, 13, 30), 9
    some = layout(prompt(0, lengths, query))
    ids = torch.randint(1, VOCAB, some.kind.shape)
    spec = require_supported(model)

    def joined(late=0):
        cache, start = DynamicCache(), 0
        for length in lengths:
            part = DynamicCache()
            model(ids[:, start : start + length], past_key_values=part)
            for layer, kv in enumerate(part.layers):
                shift = torch.full((1, length), start + late * (start > 0))
                cache.update(relocate_keys(kv.keys, shift, spec.layers[layer]), kv.values, layer)
            start += length
        position = torch.arange(start, start + query)[None]
        return model(ids[:, start:], past_key_values=cache, position_ids=position).logits

    model.set_attn_implementation("sdpa")
    pieces, misplaced = joined(), joined(late=1)
    attach(model)
    whole = model(ids, position_ids=some.position, plan=SplitPlan(some), use_cache=False).logits[
        :, -query:
    ]
    # 72 positions of float32 angles through two layers.
    torch.testing.assert_close(pieces, whole, rtol=0, atol=2e-5)
    assert (misplaced - whole).abs().max() > 2e-4


@pytest.mark.parametrize(
    ("placement", "chunks", "query"),
    [
        ("sequential", (4, 14, 17), 24),
        ("parallel", (4, 4, 4), 14),
        ("composite", (0, 0, 0), 24),
    ],
)
def test_place(placement, chunks, query):
    assert place(placement, 4, (10, 3, 7)) == (chunks, query)


def test_reserved_slots_never_depend_on_the_chunks_in_them():
    assert place("reserved", 4, (10, 3, 7), slot=10) == ((4, 14, 24), 34)
    assert place("reserved", 4, (1, 1, 1), slot=10) == ((4, 14, 24), 34)
    with pytest.raises(ValueError, match="chunk 1 takes 11 positions, the schema reserves 10"):
        place("reserved", 4, (10, 11), slot=10)


def test_place_without_chunks():
    assert place("parallel", 4, ()) == ((), 4)
