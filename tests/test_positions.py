"""Keys move exactly: over all supported rotations, and never where they cannot."""

import pytest
import torch
from families import BASE, FAMILIES, HEAD, ROPES, VOCAB, build, rope
from layouts import layout, prompt
from transformers import (
    CohereConfig,
    DeepseekV3Config,
    DynamicCache,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    SmolLM3Config,
)

from blocktune.attention import SplitPlan, attach
from blocktune.models.gate import key_layers, probe_cache
from blocktune.positions import RopeSpec, Rotation, place, relocate_keys, rotate_keys

SHIFTS = [1, -3, 1000, 30_000]


def angle_bound(position, inv_freq):
    """Bound for keys of a few units at ``position``.

    A float32 angle of ``a`` radians is rounded by up to ``a * 2**-24``, in the moved key and in
    the one it is compared with, and the keys multiply that.
    """
    return 2e-6 + 6e-7 * abs(position) * inv_freq.max().item()


def rotated(model, layer, positions):
    """Keys that a layer itself makes of one state at each of ``positions``."""
    rotary = next(m for name, m in model.named_modules() if name.endswith("rotary_emb"))
    kind = model.config.layer_types[layer] if isinstance(rotary.rope_type, dict) else None
    return probe_cache(key_layers(model)[layer], rotary, torch.tensor([positions]), kind)[0]


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("name", ROPES)
def test_relocated_key_matches_rope_at_the_new_position(name, shift):
    model = build(ROPES[name]())
    spec = RopeSpec.from_model(model)
    for layer, inv_freq in enumerate(spec.inv_freq):
        old = [5, 6, 19, 40]
        keys = rotated(model, layer, old)
        expected = rotated(model, layer, [position + shift for position in old])
        moved = relocate_keys(keys, torch.full((1, 4), shift), inv_freq)
        torch.testing.assert_close(moved, expected, rtol=0, atol=angle_bound(shift, inv_freq))
        off_by_one = relocate_keys(keys, torch.full((1, 4), shift + 1), inv_freq)
        assert (off_by_one - expected).abs().max() > 10 * angle_bound(shift, inv_freq)


def test_yarn_scaling_does_not_enter_twice():
    model = build(ROPES["yarn"]())
    assert model.model.rotary_emb.attention_scaling > 1.1
    keys = rotated(model, 0, [0, 7])
    inv_freq = RopeSpec.from_model(model).inv_freq[0]
    moved = relocate_keys(keys, torch.full((1, 2), 50), inv_freq)
    torch.testing.assert_close(moved.norm(dim=-1), keys.norm(dim=-1))


def test_partial_rotary_leaves_the_other_dimensions_alone():
    model = build(ROPES["partial"]())
    inv_freq = RopeSpec.from_model(model).inv_freq[0]
    keys = torch.randn(1, 2, 3, 8)
    moved = relocate_keys(keys, torch.tensor([[4, -2, 9]]), inv_freq)
    assert len(inv_freq) == 2
    assert torch.equal(moved[..., 4:], keys[..., 4:])
    assert not torch.isclose(moved[..., :4], keys[..., :4]).all()


def test_bfloat16_keys_are_moved_in_float32():
    inv_freq = RopeSpec.from_model(build(ROPES["default"]())).inv_freq[0]
    keys = torch.randn(1, 2, 4, 8).bfloat16()
    shift = torch.tensor([[257, 4099, -513, 30_001]])
    moved = relocate_keys(keys, shift, inv_freq)
    expected = relocate_keys(keys.float(), shift, inv_freq)
    assert moved.dtype == torch.bfloat16
    assert torch.equal(moved, expected.bfloat16())  # one rounding, at the end


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["default", "partial"])
def test_keys_turned_into_place_are_the_relocated_ones(name, dtype):
    inv_freq = RopeSpec.from_model(build(ROPES[name]())).inv_freq[0]
    keys = torch.randn(1, 2, 5, 8).to(dtype)
    shift = torch.tensor([[4, -2, 9, 0, 300]])
    store = torch.zeros(1, 2, 9, 8, dtype=dtype)
    turn = Rotation.of(shift, inv_freq)
    rotate_keys(keys[:, :, 1:4], turn.cut(slice(1, 4)), store[:, :, 2:5])
    expected = relocate_keys(keys, shift, inv_freq)[:, :, 1:4]
    torch.testing.assert_close(store[:, :, 2:5], expected, rtol=0, atol=1e-6)
    assert not store[:, :, :2].any()
    assert not store[:, :, 5:].any()


def test_shift_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"\(batch, tokens\) = \(1, 3\).* got \(3,\)"):
        relocate_keys(torch.zeros(1, 2, 3, 8), torch.zeros(3), torch.ones(4))


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
    spec = RopeSpec.from_model(model)

    def joined(late=0):
        cache, start = DynamicCache(), 0
        for length in lengths:
            part = DynamicCache()
            model(ids[:, start : start + length], past_key_values=part)
            for layer, kv in enumerate(part.layers):
                shift = torch.full((1, length), start + late * (start > 0))
                cache.update(relocate_keys(kv.keys, shift, spec.inv_freq[layer]), kv.values, layer)
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


def test_layer_without_rope_keeps_its_keys():
    config = SmolLM3Config(**BASE, no_rope_layers=[1, 0])
    assert [len(f) for f in RopeSpec.from_model(build(config)).inv_freq] == [4, 0]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_moved_in_float32_and_bfloat16(family):
    model = build(FAMILIES[family]())
    wide = RopeSpec.from_model(model).inv_freq
    model.train()
    narrow = RopeSpec.from_model(model.bfloat16()).inv_freq
    assert len(wide) == len(narrow) == 2
    assert all(len(frequencies) in (2, 4) for frequencies in wide)
    assert all(module.training for module in model.modules())


def test_weights_that_are_codes_are_probed_in_the_models_dtype():
    """A 4-bit base without biases has no floating weight in its attention."""

    class Codes(torch.nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.plain = linear.weight.detach().t()
            codes = torch.zeros(linear.weight.numel() // 2, dtype=torch.uint8)
            self.weight = torch.nn.Parameter(codes, requires_grad=False)

        def forward(self, states):
            return states @ self.plain.to(states.dtype)

    model = build(FAMILIES["llama"]())
    plain = RopeSpec.from_model(model).inv_freq
    for layer in model.model.layers:
        for name, linear in list(layer.self_attn.named_children()):
            if isinstance(linear, torch.nn.Linear):
                setattr(layer.self_attn, name, Codes(linear))
    for found, expected in zip(RopeSpec.from_model(model).inv_freq, plain, strict=True):
        assert torch.equal(found, expected)


LONGROPE = rope(
    "longrope",
    short_factor=[1.0] * 4,
    long_factor=[2.0] * 4,
    original_max_position_embeddings=128,
    factor=4.0,
)
SMALL_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4}
SMALL_OPT = {"vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2}
LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "first_k_dense_replace": 2,
}
REFUSED = {
    "dynamic": (
        lambda: LlamaConfig(**BASE, rope_parameters=rope("dynamic", factor=4.0)),
        "RoPE type 'dynamic', whose frequencies change",
    ),
    "longrope": (
        lambda: Phi3Config(**BASE, rope_parameters=LONGROPE),
        "RoPE type 'longrope', whose frequencies change",
    ),
    "gpt2": (lambda: GPT2Config(**SMALL_GPT2), "GPT2LMHeadModel has no rotary"),
    "opt": (
        lambda: OPTConfig(**SMALL_OPT, num_attention_heads=4, word_embed_proj_dim=32),
        "OPTForCausalLM has no rotary",
    ),
    "cohere": (lambda: CohereConfig(**BASE), "does not rotate its keys by halves"),
    "glm": (lambda: GlmConfig(**HEAD), "does not rotate its keys by halves"),
    "deepseek": (
        lambda: DeepseekV3Config(**{**BASE, "num_key_value_heads": 4}, **LATENT),
        "does not rotate its keys by halves",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_moved_is_refused_in_one_line(name):
    config, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as refusal:
        RopeSpec.from_model(build(config()))
    assert "\n" not in str(refusal.value)


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


def test_place_without_chunks_and_with_an_unknown_name():
    assert place("parallel", 4, ()) == ((), 4)
    with pytest.raises(ValueError, match="'random'; available: sequential, parallel, composite"):
        place("random", 4, (1,))
