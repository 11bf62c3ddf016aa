"""The prompt cache under stock models: rows computed in any order equal one forward pass.

Random weights with init std 0.2 and positions below 256, so 1e-5 is the tolerance in float32 and
one wrong visibility cell is far above it (`test_one_flipped_cell_is_seen`).
"""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from blocktune.cache import SKIP, RowCache

SIZES = {
    "vocab_size": 101,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
WINDOW = 4
LAYERED = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
CONFIGS = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=WINDOW),
    "gemma2": Gemma2Config(**SIZES, **LAYERED, sliding_window=WINDOW),
    "gemma3": Gemma3TextConfig(**SIZES, **LAYERED, sliding_window=WINDOW),
}
N = 12
TOLERANCE = 1e-5


def make(name, attention="sdpa"):
    if name == "gemma2":
        attention = "eager"  # the only one that soft-caps
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation=attention)
    return model.eval()


def causal(rows, window=None):
    """Additive mask ``(B, 1, R, N)`` of rows ``(B, R)``, given by their place in the order."""
    age = rows[:, :, None] - torch.arange(N)
    see = (age >= 0) & (age < (window or N))
    return torch.zeros(see.shape).masked_fill(~see, torch.finfo(torch.float32).min)[:, None]


def masks(name, rows):
    if name.startswith("gemma"):
        both = {"full_attention": None, "sliding_attention": WINDOW}
        return {kind: causal(rows, window) for kind, window in both.items()}
    return causal(rows, WINDOW if name == "mistral" else None)


@torch.no_grad()
def run(model, name, cache, ids, columns, mask=None):
    cache.select(columns)
    rows = columns.clamp(min=0)
    return model(
        input_ids=ids.gather(1, rows),
        attention_mask=masks(name, rows) if mask is None else mask,
        position_ids=rows,
        past_key_values=cache,
        use_cache=True,
    ).logits


def whole(model, ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def prompts(batch_size=1):
    return torch.randint(1, 101, (batch_size, N), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "attention"),
    [*((name, "eager") for name in CONFIGS), *((n, "sdpa") for n in CONFIGS if n != "gemma2")],
)
def test_rows_in_two_scattered_passes_match_one_forward(name, attention):
    model, ids = make(name, attention), prompts()
    expected = whole(model, ids)
    cache = RowCache(3, 1, N)
    first = torch.tensor([[3, 0, 2, 1, 5, 4]])
    second = torch.tensor([[11, 6, 8, 7, 10, 9]])
    got = torch.cat([run(model, name, cache, ids, columns) for columns in (first, second)], dim=1)
    order = torch.cat([first, second], dim=1)[0]
    torch.testing.assert_close(got, expected[:, order], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_chunks_in_interleaved_columns_match_one_forward_under_their_mask(attention):
    model, ids = make("llama", attention), prompts()
    group = torch.tensor([1, 0, 1, 1, 0, 0, 1, 2, 0, 2, 2, 2])  # chunks 0 and 1; 2 sees all
    rows = torch.arange(N)
    see = (rows <= rows[:, None]) & ((group == group[:, None]) | (group[:, None] == 2))
    mask = torch.zeros(1, 1, N, N).masked_fill(~see, torch.finfo(torch.float32).min)
    with torch.no_grad():
        expected = model(ids, mask, rows[None], use_cache=False).logits
    cache = RowCache(3, 1, N)
    for columns in (torch.tensor([[6, 0, 3, 2]]), torch.tensor([[9, 1, 10, 4, 11, 8, 5, 7]])):
        got = run(model, "llama", cache, ids, columns, mask[:, :, columns[0]])
        torch.testing.assert_close(got, expected[:, columns[0]], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_recomputed_rows_write_over_what_was_there(name):
    model, ids = make(name, "eager"), prompts()
    expected = whole(model, ids)
    cache = RowCache(3, 1, N)
    stale = ids.clone()
    stale[0, [4, 7]] = (stale[0, [4, 7]] + 50) % 100 + 1
    run(model, name, cache, stale, torch.arange(N)[None])
    # Everything that saw the stale tokens is computed again, in one pass of scattered columns.
    columns = torch.tensor([[9, 4, 11, 5, 7, 10, 6, 8]])
    got = run(model, name, cache, ids, columns)
    torch.testing.assert_close(got, expected[:, columns[0]], rtol=0, atol=TOLERANCE)


def test_one_flipped_cell_is_seen():
    model, ids = make("llama", "eager"), prompts()
    expected = whole(model, ids)
    columns = torch.arange(N)[None]
    mask = causal(columns)
    mask[0, 0, 9, 3] = torch.finfo(torch.float32).min
    got = run(model, "llama", RowCache(3, 1, N), ids, columns, mask)
    assert (got - expected).abs().max() > 10 * TOLERANCE
    torch.testing.assert_close(got[:, :9], expected[:, :9], rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_ragged_batch_skips_padding_rows(name):
    model, ids = make(name, "eager"), prompts(2)
    expected = whole(model, ids)
    cache = RowCache(3, 2, N)
    run(model, name, cache, ids, torch.arange(7).expand(2, -1))
    # The first prompt has three rows left to compute out of five, at its end a hole.
    columns = torch.tensor([[8, 7, SKIP, 9, SKIP], [11, 10, 9, 8, 7]])
    got = run(model, name, cache, ids, columns)
    for prompt, row in ((0, 0), (0, 1), (0, 3), (1, 0), (1, 2), (1, 4)):
        there = expected[prompt, columns[prompt, row]]
        torch.testing.assert_close(got[prompt, row], there, rtol=0, atol=TOLERANCE)
    assert not cache.layers[1].keys[0, :, 10:].any()
    assert cache.layers[1].keys[1, :, 10:].any()


@pytest.mark.parametrize("spare", [0, 2, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_by_appended_columns_matches_one_forward(name, spare):
    model, ids = make(name, "sdpa"), prompts(2)
    expected = whole(model, ids)
    cache = RowCache(3, 2, 5, spare=spare)
    cache.select(torch.arange(5).expand(2, -1))
    steps = [(ids[:, :5], torch.arange(5))]
    steps += [(ids[:, i : i + 1], torch.tensor([i])) for i in range(5, N)]
    outputs = []
    for index, (tokens, positions) in enumerate(steps):
        if index:
            assert cache.append().tolist() == [[index + 4], [index + 4]]
        assert cache.get_seq_length() == positions[0]
        mask = masks(name, positions.expand(2, -1))
        n = cache.num_columns
        mask = {k: m[..., :n] for k, m in mask.items()} if type(mask) is dict else mask[..., :n]
        with torch.no_grad():
            outputs.append(model(tokens, mask, positions[None], cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(outputs, dim=1), expected, rtol=0, atol=TOLERANCE)
    assert all(layer.keys.shape == (2, 2, N, 8) for layer in cache.layers)


@pytest.mark.parametrize("name", CONFIGS)
def test_no_layer_is_truncated_and_sizes_are_those_of_all_columns(name):
    model, ids = make(name, "eager"), prompts()
    cache = RowCache(3, 1, N, spare=3)
    run(model, name, cache, ids, torch.arange(N)[None])
    assert [layer.keys.shape[2] for layer in cache.layers] == [N] * 3
    assert cache.is_sliding == [False] * 3
    assert not cache.is_compileable
    assert [cache.get_mask_sizes(4, layer) for layer in range(3)] == [(N, 0)] * 3
    assert (cache.batch_size, cache.get_max_length(), len(cache)) == (1, -1, 3)


def test_columns_may_change_on_the_way_through_the_layers():
    keys, values = torch.randn(2, 1, 2, 3, 4).unbind()
    cache = RowCache(2, 1, 6)
    cache.select(torch.tensor([[0, 1, 2]]))
    cache.select(torch.tensor([[5, 3]]), layers=[1])
    cache.update(keys, values, 0)
    got, _ = cache.update(keys[:, :, 1:], values[:, :, 1:], 1)
    assert torch.equal(cache.layers[0].keys[:, :, :3], keys)
    assert torch.equal(got[:, :, [5, 3]], keys[:, :, 1:])
    assert not got[:, :, [0, 1, 2, 4]].any()


def test_an_observer_sees_fresh_states_beside_the_held_ones_and_may_stop_the_pass():
    class Stop(Exception):
        pass

    model, ids = make("llama", "sdpa"), prompts()
    cache = RowCache(3, 1, N)
    run(model, "llama", cache, ids, torch.arange(N)[None])
    before = [layer.keys.clone() for layer in cache.layers]
    changed = ids.clone()
    changed[0, 6] = changed[0, 6] % 100 + 1
    seen = []

    def observer(keys, values):
        seen.append((keys.clone(), cache.layers[1].held()[0].clone()))
        raise Stop

    cache.layers[1].observer = observer
    columns = torch.tensor([[8, 5, 6, 7]])
    with pytest.raises(Stop):
        run(model, "llama", cache, changed, columns)
    [(fresh, cached)] = seen
    assert torch.equal(cached, before[1][:, :, [8, 5, 6, 7]])
    deviation = (fresh - cached).norm(dim=-1).sum(dim=1)[0]
    assert deviation[1] < TOLERANCE  # row 5 is before the change
    assert (deviation[[0, 2, 3]] > 10 * TOLERANCE).all()
    assert not torch.equal(cache.layers[0].keys, before[0])
    assert torch.equal(cache.layers[1].keys, before[1])
    assert torch.equal(cache.layers[2].keys, before[2])
    cache.layers[1].observer = None
    run(model, "llama", cache, changed, columns)
    assert len(seen) == 1


def test_loaded_chunks_lie_where_they_were_put_and_end_exactness():
    keys, values = torch.randn(2, 2, 3, 4).unbind()
    cache = RowCache(2, 2, 6, exact=True)
    own_keys, own_values = cache.room(1, 1, slice(2, 5), keys, values)
    own_keys.copy_(keys)
    own_values.copy_(values)
    assert not cache.exact
    assert torch.equal(cache.layers[1].keys[1, :, 2:5], keys)
    assert torch.equal(cache.layers[1].values[1, :, 2:5], values)
    assert not cache.layers[1].keys[0].any()
    assert not cache.layers[1].keys[1, :, [0, 1, 5]].any()


def test_a_pass_of_other_rows_than_selected_is_refused():
    cache = RowCache(1, 1, 6)
    states = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"\(1, 3\), but selected were None"):
        cache.update(states, states, 0)
    cache.select(torch.tensor([[0, 1]]))
    with pytest.raises(ValueError, match=r"selected were \(1, 2\)"):
        cache.update(states, states, 0)


def test_columns_that_nobody_wrote_are_zeros(monkeypatch):
    """Also where the memory held something else: masked columns must be finite."""
    empty = torch.Tensor.new_empty
    poisoned = lambda self, *args, **kw: empty(self, *args, **kw).fill_(float("nan"))  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned)
    cache, states = RowCache(1, 2, 6, spare=2), torch.ones(1, 2, 3)
    for prompt, columns in ((0, slice(1, 3)), (1, slice(0, 2))):
        for part in cache.room(0, prompt, columns, states, states):
            part.copy_(states)
    layer = cache.layers[0]
    assert layer.values[:, 0, :, 0].tolist() == [[0, 1, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0]]
    cache.append(2)
    cache.layers[0].store(torch.ones(2, 1, 2, 3), torch.ones(2, 1, 2, 3))
    assert layer.keys[:, 0, :, 0].sum(1).tolist() == [4, 4]
    assert cache.layers[0].values.isfinite().all()
