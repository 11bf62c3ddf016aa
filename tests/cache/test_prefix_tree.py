"""The exact prefix cache: longest path, locks, eviction, and nothing approximate ever."""

import random
from itertools import combinations

import pytest
import torch
from cache.made import MODEL, OTHER_MODEL
from cache.prompts import (
    DIM,
    HEADS,
    ONE,
    PREFIX,
    STATE,
    STATE_BYTES,
    THREE,
    TOKEN_BYTES,
    TWO,
    exact_of,
    matched,
    prefill,
)
from transformers import AutoModelForCausalLM, LlamaConfig

from blocktune.cache import ChunkStore, PrefixTree, RowCache, cut_exact, prefix_tree
from blocktune.cache.exact import place_checkpoints
from blocktune.cache.store.shelf import Shelf


def test_a_cut_holds_its_tokens_at_their_place_and_nothing_else():
    cache = prefill(PREFIX + ONE + TWO)
    cut = cut_exact(cache, 0, PREFIX + ONE, MODEL, start=2)
    assert (tuple(cut.token_ids.tolist()), tuple(cut.context.tolist())) == (ONE, PREFIX)
    assert cut.keys[0][0, :, 0].tolist() == [10, 11, 12]
    assert cut.values[0][0, :, 0].tolist() == [-10, -11, -12]
    assert cut.keys[0].untyped_storage().nbytes() == 3 * DIM * 4
    cache.layers[0].keys.zero_()
    assert cut.keys[0][0, :, 0].tolist() == [10, 11, 12]


def test_the_longest_prefix_is_found_token_by_token():
    tree = PrefixTree()
    assert tree.insert(exact_of(PREFIX, ONE, TWO)) == 6
    assert tree.insert(exact_of(PREFIX, TWO)) == 1  # the prefix is known
    assert matched(tree, PREFIX, ONE, TWO, THREE) == 6
    assert matched(tree, PREFIX, TWO, ONE) == 3
    assert matched(tree, PREFIX, (10, 11, 13)) == 4  # all but the last word
    assert matched(tree, PREFIX, THREE, TWO) == 2
    assert matched(tree, ONE, TWO) == 0
    assert matched(tree) == 0
    stats = tree.stats()
    assert (stats.num_tokens, stats.num_bytes) == (7, 7 * TOKEN_BYTES)
    assert (stats.hit_tokens, stats.missed_tokens) == (15, 2 + 3 + 1 + 3 + 4)


def test_a_run_is_cut_where_a_later_prompt_turns_off():
    tree = PrefixTree()
    tree.insert(exact_of(PREFIX, ONE))
    assert tree.insert(exact_of(PREFIX, (10, 11, 99), start=2)) == 1
    assert tree.insert(exact_of((1, 7))) == 1
    assert matched(tree, PREFIX, ONE) == 5
    assert matched(tree, PREFIX, (10, 11, 99)) == 5
    assert matched(tree, (1, 7, 7)) == 2
    assert tree.stats().num_bytes == 7 * TOKEN_BYTES


def test_random_prompts_find_what_a_list_of_them_finds():
    rng = random.Random(0)
    tree, known = PrefixTree(), []
    for _ in range(300):
        ids = tuple(rng.randint(0, 2) for _ in range(rng.randint(1, 12)))
        shared = [
            next(
                (i for i, (a, b) in enumerate(zip(ids, other, strict=False)) if a != b),
                min(len(ids), len(other)),
            )
            for other in known
        ]
        assert matched(tree, ids) == max(shared, default=0)
        tree.insert(exact_of(ids))
        known.append(ids)
    distinct = {ids[:length] for ids in known for length in range(1, len(ids) + 1)}
    assert tree.stats().num_tokens == len(distinct)


def test_models_do_not_see_each_other():
    tree = PrefixTree()
    tree.insert(exact_of(PREFIX, ONE))
    assert matched(tree, PREFIX, ONE) == 5
    assert matched(tree, PREFIX, ONE, model=OTHER_MODEL) == 0


def test_the_least_recently_used_leaf_leaves_first():
    tree = PrefixTree(max_bytes=(2 + 3 + 1 + 2) * TOKEN_BYTES)
    for piece in (ONE, TWO, THREE):
        tree.insert(exact_of(PREFIX, piece))
    matched(tree, PREFIX, ONE)  # now TWO is the oldest leaf, and then THREE
    assert tree.insert(exact_of(PREFIX, (40, 41))) == 2
    assert [matched(tree, PREFIX, p) for p in (TWO, THREE, ONE, (40, 41))] == [2, 2, 5, 4]
    assert tree.stats().evictions == 2
    assert tree.stats().num_bytes == (2 + 3 + 2) * TOKEN_BYTES


def test_a_parent_leaves_only_after_its_children():
    tree = PrefixTree(max_bytes=6 * TOKEN_BYTES)
    for stop in (1, 2, 3):
        tree.insert(exact_of(*(PREFIX, ONE, TWO)[:stop]))
    assert tree.insert(exact_of((50, 51, 52))) == 3
    assert matched(tree, PREFIX, ONE, TWO) == 2
    assert matched(tree, (50, 51, 52)) == 3


def test_namespaces_that_nobody_fills_leave_nothing():
    tree = PrefixTree(max_bytes=4 * TOKEN_BYTES)
    for tenant in range(50):
        assert matched(tree, ONE, model=f"a{tenant}") == 0
        tree.insert(exact_of(ONE, fingerprint=f"b{tenant}"))
    assert len(tree._roots) == 1


def test_what_is_in_use_stays_even_if_it_is_cut():
    tree = PrefixTree(max_bytes=5 * TOKEN_BYTES)
    tree.insert(exact_of(PREFIX, ONE))
    with tree.match(MODEL, PREFIX + ONE):
        assert tree.insert(exact_of(PREFIX, TWO)) == 0  # which cuts the run
        assert tree.stats().declined == 1
        assert matched(tree, PREFIX, ONE) == 5
    assert tree.insert(exact_of(PREFIX, TWO)) == 1
    assert matched(tree, PREFIX, ONE) == 2


def test_what_cannot_fit_evicts_nothing_and_is_counted():
    tree = PrefixTree(max_bytes=5 * TOKEN_BYTES)
    tree.insert(exact_of(PREFIX, ONE))
    assert tree.insert(exact_of(tuple(range(6)), TWO)) == 0
    assert (tree.stats().evictions, tree.stats().declined) == (0, 7)
    assert matched(tree, PREFIX, ONE) == 5


def test_a_run_whose_beginning_left_is_not_kept():
    tree = PrefixTree()
    assert tree.insert(exact_of(PREFIX, ONE, start=2)) == 0
    assert tree.stats().declined == 5


def test_recurrent_states_resume_only_where_they_are():
    tree = PrefixTree()
    assert tree.insert(exact_of(PREFIX, ONE, TWO, states={3: STATE, 5: STATE})) == 6
    for length, resumed in ((2, 0), (3, 3), (4, 3), (5, 5), (6, 5)):
        with tree.match(MODEL, (PREFIX + ONE + TWO)[:length]) as match:
            assert (match.num_tokens, match.overlap) == (resumed, length)
            assert (match.state is STATE) == (resumed > 0)
    stats = tree.stats()
    assert (stats.num_tokens, stats.num_states) == (6, 2)
    assert stats.num_bytes == 6 * TOKEN_BYTES + 2 * STATE_BYTES
    # A state in what is known is added, and another one of the same depth is not.
    more = {4: STATE, 5: (torch.zeros(9), None)}
    assert tree.insert(exact_of(PREFIX, ONE, start=3, states=more)) == 0
    assert tree.stats().num_states == 3
    with tree.match(MODEL, (*PREFIX, 10, 11)) as match:
        assert match.num_tokens == 4


def test_states_find_room_or_are_left_out():
    tree = PrefixTree(max_bytes=3 * TOKEN_BYTES + STATE_BYTES)
    tree.insert(exact_of(ONE, states={2: STATE, 3: STATE}))
    assert tree.stats().num_states == 1
    with tree.match(MODEL, ONE) as match:
        assert match.num_tokens == 2
    tree.insert(exact_of((9, 9), states={1: STATE}))
    assert tree.stats().num_bytes <= tree.max_bytes


def test_checkpoints_go_where_earlier_prompts_were_shared():
    tree = PrefixTree(checkpoints=2)
    assert tree.checkpoints_for(MODEL, 9, (2, 5, 9)) == (5, 9)
    tree.insert(exact_of(tuple(range(9)), states={}))
    for _ in range(5):
        with tree.match(MODEL, (*range(7), 99)):
            pass
    assert tree.checkpoints_for(MODEL, 9, (2, 5, 9)) == (5, 7)
    assert tree.checkpoints_for(MODEL, 6, (2, 6)) == (2, 6)
    assert tree.checkpoints_for(OTHER_MODEL, 9, (2,)) == (2,)


def recomputed_tokens(weights, placed):
    nearest = {depth: max(p for p in (0, *placed) if p <= depth) for depth in weights}
    return sum(weight * (depth - nearest[depth]) for depth, weight in weights.items())


def again(weights, checkpoints):
    """Tokens that are computed again after the deepest checkpoint that serves."""
    placed = (0, *checkpoints)
    return sum(n * (depth - max(p for p in placed if p <= depth)) for depth, n in weights.items())


def test_the_dynamic_programme_is_the_best_of_all_placements():
    rng = random.Random(0)
    for _ in range(500):
        depth = rng.randint(1, 9)
        weights = {rng.randint(0, depth): rng.randint(1, 5) for _ in range(rng.randint(1, 7))}
        budget = rng.randint(0, 4)
        every = range(1, depth + 1)
        best = min(
            again(weights, chosen)
            for count in range(budget + 1)
            for chosen in combinations(every, min(count, depth))
        )
        placed = place_checkpoints(weights, budget)
        assert len(placed) <= budget
        assert again(weights, placed) == best


def test_a_cache_that_reused_a_chunk_gives_no_exact_states():
    cache = prefill(PREFIX + ONE)
    chunk = torch.ones(HEADS, 3, DIM)
    cache.room(0, 0, slice(2, 5), chunk, chunk)[0].copy_(chunk)
    # Not even after everything was computed again: nobody can prove that it was everything.
    cache.select(torch.arange(5)[None])
    cache.update(torch.ones(1, HEADS, 5, DIM), torch.ones(1, HEADS, 5, DIM), 0)
    with pytest.raises(ValueError, match="never enter the exact prefix cache"):
        cut_exact(cache, 0, PREFIX + ONE, MODEL)
    with pytest.raises(ValueError, match="never enter the exact prefix cache"):
        cut_exact(RowCache(1, 1, 5), 0, PREFIX + ONE, MODEL)


def test_a_tree_needs_memory():
    with pytest.raises(ValueError, match="got 0 bytes"):
        PrefixTree(max_bytes=0)


@torch.no_grad()
def test_a_prompt_continued_from_the_tree_matches_its_full_prefill():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
    )
    model = AutoModelForCausalLM.from_config(config).eval()

    def run(cache, ids, start):
        columns = torch.arange(start, len(ids))[None]
        cache.select(columns)
        see = columns[0][:, None] >= torch.arange(len(ids))
        tokens = torch.tensor(ids)[None, start:]
        return model(tokens, see[None, None], columns, cache, use_cache=True).logits

    first = RowCache(2, 1, 6, exact=True)
    run(first, PREFIX + ONE + TWO, 0)
    tree = PrefixTree()
    tree.insert(cut_exact(first, 0, PREFIX + ONE + TWO, MODEL))

    ids = PREFIX + ONE + THREE
    second = RowCache(2, 1, len(ids), exact=True)
    with tree.match(MODEL, ids) as match:
        match.load(second, prompt=0)
        assert match.num_tokens == 5
    got = run(second, ids, 5)
    expected = model(torch.tensor(ids)[None], use_cache=False).logits[:, 5:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    # What was loaded is exact, so the whole may be stored in turn.
    assert tree.insert(cut_exact(second, 0, ids, MODEL, start=5)) == 2
    # And the check can fail: without the chunk's states the answer is another.
    third = RowCache(2, 1, len(ids), exact=True)
    with tree.match(MODEL, PREFIX) as match:
        match.load(third, prompt=0)
    assert (run(third, ids, 5) - expected).abs().max() > 1e-4


def test_runs_in_files_only_are_forgotten_when_there_are_too_many(tmp_path, monkeypatch):
    """Every new prompt of a server leaves one, long after the store has evicted its file."""
    monkeypatch.setattr(prefix_tree, "_NODES", 8)
    tree = PrefixTree(5 * TOKEN_BYTES, store=ChunkStore(0, folder=tmp_path))
    for number in range(60):
        tree.insert(exact_of((100 + number, 3)))
    assert len(list(tree._nodes())) <= 8 + 4
    assert matched(tree, (159, 3)) == 2
    assert matched(tree, (100, 3)) == 0


def test_files_of_a_tenant_count_against_its_quota(tmp_path):
    store = ChunkStore(0, folder=tmp_path)
    tree = PrefixTree(3 * TOKEN_BYTES, store=store)
    tree.charge(MODEL, "acme")
    for number in range(3):
        tree.insert(exact_of((100 + number, 3)))
    [(_, sums)] = Shelf.open(str(tmp_path)).ledger.counts("tenant").items()
    assert set(Shelf.open(str(tmp_path)).ledger.counts("tenant")) == {"acme"}
    assert sums["chunks"] == 2
