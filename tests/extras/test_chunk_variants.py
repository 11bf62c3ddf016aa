"""Cache-Craft's arithmetic by hand, and what the variant store remembers."""

import math

import pytest
import torch
from cache.made import MODEL, OTHER_MODEL, made_chunk

from blocktune.cache import ChunkStore, key_after
from blocktune.extras.cache_craft.variants import (
    Variant,
    VariantStore,
    cache_context_impact,
    cache_fix_overhead,
    order_penalty,
    prefix_overlap,
)

A, B, C, D = (1, 1), (2, 2, 2, 2), (3,), (4, 4)
CHUNK = (7, 8, 9, 10)


def made(context=(A, B), inter=(3.0, 1.0), intra=2.0, prefix=(0,)):
    return Variant(prefix, context, torch.tensor(inter), torch.ones(4), intra)


def test_impact_by_hand():
    # a = 3 / (4 * 2) + 1 / (4 * 4), b = 2 / 16
    outside, inside = 3 / 8 + 1 / 16, 2 / 16
    expected = 1 / (1 + math.exp(-outside / inside))
    assert cache_context_impact(made(), 4) == pytest.approx(expected)
    assert cache_context_impact(made((), ()), 4) == 0.5
    assert cache_context_impact(made(intra=0.0), 4) == 1.0
    assert cache_context_impact(made((), (), intra=0.0), 4) == 0.5


@pytest.mark.parametrize(
    ("context", "overlap"),
    [((A, B), 1.0), ((A,), 0.75), ((B, C), 0.25), ((C,), 0.0), ((), 0.0)],
)
def test_overlap_weighs_old_chunks_by_the_attention_they_got(context, overlap):
    assert prefix_overlap(made(), context) == overlap


def test_overlap_with_nothing_to_miss_is_whole():
    assert prefix_overlap(made((), ()), (A,)) == 1.0


@pytest.mark.parametrize(
    ("old", "new", "penalty"),
    [
        ((A, B, C), (A, B, C), 0.0),
        ((A, B, C), (C, B, A), 1.0),
        ((A, B, C), (B, A, C), 1 / 3),
        ((A, B), (B, D), 0.0),
        ((A,), (B,), 0.0),
        ((B, A, B, B, B), (A, B), 0.1),  # each time that a chunk came, at its first place now
        ((A, B), (A, B, A), 0.0),
    ],
)
def test_order_penalty_is_the_share_of_turned_pairs(old, new, penalty):
    assert order_penalty(old, new) == pytest.approx(penalty)


def test_a_chunk_that_came_four_times_is_turned_once():
    """Old 1 0 1 1 1, new 0 1: all attention is to chunks that return, one pair of ten is turned."""
    zero, one = (1, 2, 3, 4), (5, 6, 7, 8)
    variant = made((one, zero, one, one, one), (1.0, 2.0, 1.0, 1.0, 1.0))
    assert prefix_overlap(variant, (zero, one)) == 1.0
    impact = cache_context_impact(variant, 4)
    fixed = cache_fix_overhead(variant, 4, (zero, one))
    assert fixed == pytest.approx(impact * (1 - 0.9))


def test_fix_overhead_is_nothing_in_the_old_context_and_capped():
    assert cache_fix_overhead(made(), 4, (A, B)) == 0.0
    impact = cache_context_impact(made(), 4)
    assert cache_fix_overhead(made(), 4, (A,), alpha=0.5) == pytest.approx(0.5 * impact * 0.25)
    assert cache_fix_overhead(made(), 4, (B, A)) == pytest.approx(impact)
    assert cache_fix_overhead(made(), 4, (), alpha=9) == 1.0
    assert cache_fix_overhead(made(), 4, (), alpha=0) == 0.0


@pytest.mark.parametrize("tier", ["memory", "folder"])
def test_the_variant_that_fits_best_is_recalled(tmp_path, tier):
    store = ChunkStore() if tier == "memory" else ChunkStore(max_bytes=0, folder=tmp_path)
    variants = VariantStore(store, MODEL)
    assert variants.best(CHUNK, (A,)) is None
    variants.learn(CHUNK, made((A, B)), 5)
    variants.learn(CHUNK, made((C, D)), 5)
    overhead, recalled = variants.best(CHUNK, (C, D))
    assert (recalled.context, overhead) == ((C, D), 0.0)
    assert recalled.blanks == (0, 3, 4, 4)
    assert variants.best(CHUNK, (A, B))[1].context == (A, B)
    assert variants.best((7, 8, 9, 11), (A, B)) is None
    assert VariantStore(store, OTHER_MODEL).best(CHUNK, (A, B)) is None


def test_learning_again_replaces_and_the_least_used_leaves():
    variants = VariantStore(ChunkStore(), MODEL)
    contexts = [((number,),) for number in range(5)]
    for context in contexts:
        variants.learn(CHUNK, made(context, (1.0,)), 5)
        variants.used(CHUNK, (0, *context[0]))
    variants.learn(CHUNK, made(contexts[0], (2.0,)), 5)
    assert float(variants.find(CHUNK, (0, 0)).inter) == 2.0
    variants.used(CHUNK, (0, 0))
    variants.learn(CHUNK, made(((9,),), (1.0,)), 5)
    assert variants.find(CHUNK, (0, 1)) is None
    assert variants.find(CHUNK, (0, 0)) is not None
    assert variants.find(CHUNK, (0, 9)) is not None
    assert len(variants._uses) == 4  # what has left is not counted for ever, and holds no tokens
    assert all(isinstance(key, str) for key in variants._uses)


def test_uses_are_counted_of_a_bounded_number_of_variants(monkeypatch):
    monkeypatch.setattr("blocktune.extras.cache_craft.variants.MOST", 3)
    variants = VariantStore(ChunkStore(), MODEL)
    for number in (0, 1, 0, 2, 3, 0):
        variants.used(CHUNK, (number,))
    assert sorted(variants._uses.values()) == [1, 1, 3]


@pytest.mark.parametrize("tier", ["memory", "folder"])
def test_what_leaves_takes_its_keys_and_values_along(tmp_path, tier):
    store = ChunkStore() if tier == "memory" else ChunkStore(folder=tmp_path)
    variants = VariantStore(store, MODEL)
    for context in ((A, B), (A,), (), (B,)):
        variant = made(context, (1.0,) * len(context))
        store.put(
            key_after(MODEL, CHUNK, variant.blanks), made_chunk(4, token_ids=torch.tensor(CHUNK))
        )
        variants.learn(CHUNK, variant, 2)
    kept = {(A, B): False, (A,): False, (): True, (B,): True}
    # What was encoded alone serves others too.
    for context, there in kept.items():
        key = key_after(MODEL, CHUNK, made(context, (1.0,) * len(context)).blanks)
        assert (key in store) is there
    variants.learn(CHUNK, made((C,), (1.0,)), 1)
    assert key_after(MODEL, CHUNK, (0,)) in store
    assert variants.find(CHUNK, (0,)) is None


def test_a_variant_without_prefix_or_context_is_stored_too(tmp_path):
    store = ChunkStore(max_bytes=0, folder=tmp_path)
    VariantStore(store, MODEL).learn(CHUNK, made((), (), prefix=()), 1)
    variant = VariantStore(store, MODEL).find(CHUNK, ())
    assert (variant.prefix, variant.context, variant.intra) == ((), (), 2.0)
