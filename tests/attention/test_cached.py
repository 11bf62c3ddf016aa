"""Computed rows over a cache of all columns: whatever is computed, the causal mask is the truth."""

import pytest
import torch
from largest_tensor import LargestTensor

from blocktune.attention.cached import CachePlan, find_tails
from blocktune.attention.kernels import AttentionParams, folded_attention, plain_attention
from blocktune.attention.masks import KEPT_CELLS
from blocktune.layout import FOREVER, GLOBAL, NO_CHUNK, NO_ROW, Kind, LayerRule, Rows

TOLERANCE = 1e-5
HEADS, KV_HEADS, DIM = 4, 2, 8


def rows(orders: list[list[int]], width: int, left: bool) -> Rows:
    """Global rows of given orders, padded to a width on the left or the right."""

    def padded(values: list[int], fill: int) -> list[int]:
        pads = [fill] * (width - len(values))
        return pads + values if left else values + pads

    order = torch.tensor([padded(own, 0) for own in orders])
    kind = torch.tensor([padded([int(Kind.QUERY)] * len(own), int(Kind.PAD)) for own in orders])
    same = torch.zeros_like(order)
    return Rows(
        kind=kind,
        chunk=same + NO_CHUNK,
        offset=same,
        position=order,
        order=order,
        group=same + GLOBAL,
        sample=same,
        supersedes=same + NO_ROW,
        until=same + FOREVER,
    )


def computed_and_columns(computed: list[list[int]], lengths: list[int]) -> tuple[Rows, Rows]:
    query = rows(computed, max(map(len, computed)), left=True)
    return query, rows([list(range(n)) for n in lengths], max(lengths), left=False)


def states(query: Rows, key: Rows) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(HEADS, query), (KV_HEADS, key), (KV_HEADS, key)]
    return [torch.randn(len(r.kind), h, r.kind.shape[1], DIM, generator=draw) for h, r in shapes]


CASES = {
    "all": ([range(40)], [40]),
    "all but a prefix": ([range(7, 40)], [40]),
    "all of ragged prompts": ([range(40), range(3, 33)], [40, 33]),
    "one row": ([[39], [39]], [40, 40]),
    "one row of ragged prompts": ([[39], [20]], [40, 21]),
    "few rows at the end": ([range(30, 40)], [40]),
    "few rows anywhere": ([[3, 4, 19, 30, 39], [1, 9, 20]], [40, 21]),
    "most rows, with a hole": ([[*range(5, 20), *range(21, 40)]], [40]),
}
TAILS = {"all", "all but a prefix", "all of ragged prompts", "one row"}


def case(name):
    computed, lengths = CASES[name]
    return computed_and_columns([list(own) for own in computed], lengths)


def truth(query, key, qkv, params, window=None, flip=None):
    mask = key.order[:, None] <= query.order[..., None]
    if window is not None:
        mask &= query.order[..., None] - key.order[:, None] < window
    mask &= (key.kind != Kind.PAD)[:, None] & (query.kind != Kind.PAD)[..., None]
    if flip is not None:
        mask[flip] ^= True
    return plain_attention(*qkv, mask[:, None], params).transpose(1, 2)


@pytest.mark.parametrize(
    "params",
    [
        AttentionParams(0.3),
        AttentionParams(0.3, softcap=4.0),
        AttentionParams(0.3, sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
    ],
    ids=["plain", "capped", "sinks"],
)
@pytest.mark.parametrize("kept_cells", [0, KEPT_CELLS], ids=["remade", "kept"])
@pytest.mark.parametrize("window", [None, 12])
@pytest.mark.parametrize("name", CASES)
def test_computed_rows_match_the_causal_mask(name, window, kept_cells, params):
    query, key = case(name)
    qkv = states(query, key)
    plan = CachePlan(query, key, kept_cells=kept_cells)
    out = plan.attend(*qkv, LayerRule(layer=1, window=window), params)
    real = query.kind != Kind.PAD
    expected = truth(query, key, qkv, params, window)
    torch.testing.assert_close(out[real], expected[real], rtol=0, atol=TOLERANCE)
    flipped = truth(query, key, qkv, params, window, flip=(0, -1, int(query.order[0, -1]) - 1))
    assert (out - flipped)[real].abs().max() > 10 * TOLERANCE


@pytest.mark.parametrize("name", CASES)
def test_the_last_rows_of_prompts_need_no_mask(name):
    assert bool(find_tails(*case(name))) == (name in TAILS)


def test_a_tail_makes_no_tensor_of_rows_by_columns():
    query, key = computed_and_columns([list(range(64, 2048))], [2048])
    with LargestTensor() as largest:
        CachePlan(query, key).attend(*states(query, key), LayerRule(), AttentionParams(0.3))
    assert largest.numel < 2048 * 2048 // 4


def test_rows_do_not_pay_for_the_columns_after_them():
    spread = list(range(0, 8192, 8))  # an eighth of all columns
    query, key = computed_and_columns([spread], [8192])
    plan = CachePlan(query, key)
    made = states(query, key)
    plan.attend(*made, LayerRule(), AttentionParams(0.3))
    each = made[0].shape[1] * (made[0].shape[3] + made[2].shape[3])
    assert int(plan.attention_macs()[0]) < 0.57 * each * len(spread) * 8192


def test_heads_folded_into_rows_match_plain_attention():
    query, key = case("few rows anywhere")
    qkv = states(query, key)
    mask = torch.rand(2, 1, query.kind.shape[1], key.kind.shape[1]) > 0.5
    mask[..., 0] = True
    expected = plain_attention(*qkv, mask, AttentionParams(0.3))
    torch.testing.assert_close(folded_attention(*qkv, mask, AttentionParams(0.3)), expected)


def test_rows_of_a_group_are_no_tail():
    """They see their own group alone: the causal kernel would show them all before."""
    query, key = case("all but a prefix")
    assert find_tails(query, key)
    query.group[0, 5] = 0
    assert find_tails(query, key) == []
