"""The exact prefix cache: longest path, locks, eviction, and nothing approximate ever."""

import pytest
import torch
from cache.made import MODEL, OTHER_MODEL, made_chunk
from transformers import AutoModelForCausalLM, LlamaConfig

from blocktune.cache import ExactKV, PrefixTree, RowCache, cut_exact
from blocktune.cache.prefix_tree import context_digest

HEADS, DIM = 1, 2
TOKEN_BYTES = 2 * HEADS * DIM * 4 + 8  # keys and values of one layer, and the id

PREFIX, ONE, TWO, THREE = (1, 2), (10, 11, 12), (20,), (30, 31)


def prefill(*pieces):
    """What a full prefill leaves: states that say which column of which prompt they are."""
    tokens = [token for piece in pieces for token in piece]
    cache = RowCache(1, 1, len(tokens), exact=True)
    cache.select(torch.arange(len(tokens))[None])
    states = torch.tensor(tokens, dtype=torch.float32)[None, None, :, None].expand(
        1, HEADS, -1, DIM
    )
    cache.update(states, -states, 0)
    return cache


def exacts_of(*pieces, fingerprint=MODEL):
    return cut_exact(prefill(*pieces), 0, pieces, fingerprint)


def matched(tree, *pieces, **options):
    with tree.match(MODEL, pieces, **options) as match:
        return [tuple(exact.kv.token_ids.tolist()) for exact in match.exacts]


def test_a_cut_holds_its_piece_at_its_place_and_nothing_else():
    cache = prefill(PREFIX, ONE, TWO)
    prefix, one, two = cut_exact(cache, 0, [PREFIX, ONE, TWO], MODEL)
    assert [exact.kv.origin for exact in (prefix, one, two)] == [0, 2, 5]
    assert one.kv.keys[0][0, :, 0].tolist() == [10, 11, 12]
    assert one.kv.values[0][0, :, 0].tolist() == [-10, -11, -12]
    assert one.kv.keys[0].untyped_storage().nbytes() == 3 * DIM * 4
    assert one.context == context_digest([PREFIX])
    cache.layers[0].keys.zero_()
    assert two.kv.keys[0][0, :, 0].tolist() == [20]


def test_the_longest_path_is_found():
    tree = PrefixTree()
    assert tree.insert(exacts_of(PREFIX, ONE, TWO)) == 3
    assert tree.insert(exacts_of(PREFIX, TWO)) == 1  # the prefix is known
    assert matched(tree, PREFIX, ONE, TWO, THREE) == [PREFIX, ONE, TWO]
    assert matched(tree, PREFIX, TWO, ONE) == [PREFIX, TWO]
    assert matched(tree, PREFIX, THREE, TWO) == [PREFIX]
    assert matched(tree, ONE, TWO) == []
    assert matched(tree) == []
    stats = tree.stats()
    assert (stats.num_pieces, stats.num_bytes) == (4, (2 + 3 + 1 + 1) * TOKEN_BYTES)
    # Prompts of 8, 6, 5 and 4 tokens; matched 6, 3, 2 and 0.
    assert (stats.hit_tokens, stats.missed_tokens) == (11, 2 + 3 + 3 + 4)


def test_the_same_chunk_after_another_context_is_another_state():
    tree = PrefixTree()
    tree.insert(exacts_of(PREFIX, ONE, TWO))
    tree.insert(exacts_of(PREFIX, TWO, ONE))
    with tree.match(MODEL, [PREFIX, TWO, ONE]) as match:
        assert [exact.kv.origin for exact in match.exacts] == [0, 2, 3]
        assert (match.num_tokens, match.num_bytes) == (6, 6 * TOKEN_BYTES)


def test_models_and_salts_do_not_see_each_other():
    tree = PrefixTree()
    tree.insert(exacts_of(PREFIX, ONE), salt="tenant a")
    assert matched(tree, PREFIX, ONE) == []
    assert matched(tree, PREFIX, ONE, salt="tenant b") == []
    assert matched(tree, PREFIX, ONE, salt="tenant a") == [PREFIX, ONE]
    with tree.match(OTHER_MODEL, [PREFIX, ONE], salt="tenant a") as match:
        assert match.exacts == ()
    tree.insert(exacts_of(PREFIX, fingerprint=OTHER_MODEL), salt="tenant a")
    with tree.match(OTHER_MODEL, [PREFIX, ONE], salt="tenant a") as match:
        assert [exact.kv.fingerprint for exact in match.exacts] == [OTHER_MODEL]


def test_the_least_recently_used_leaf_leaves_first():
    tree = PrefixTree(max_bytes=(2 + 3 + 1 + 2) * TOKEN_BYTES)
    tree.insert(exacts_of(PREFIX, ONE))
    tree.insert(exacts_of(PREFIX, TWO))
    tree.insert(exacts_of(PREFIX, THREE))
    matched(tree, PREFIX, ONE)  # now TWO is the oldest leaf, and then THREE
    assert tree.insert(exacts_of(PREFIX, (40, 41))) == 1
    assert matched(tree, PREFIX, TWO) == [PREFIX]
    assert matched(tree, PREFIX, THREE) == [PREFIX]
    assert matched(tree, PREFIX, ONE) == [PREFIX, ONE]
    assert matched(tree, PREFIX, (40, 41)) == [PREFIX, (40, 41)]
    assert tree.stats().evictions == 2
    assert tree.stats().num_bytes == (2 + 3 + 2) * TOKEN_BYTES


def test_a_parent_leaves_only_after_its_children():
    tree = PrefixTree(max_bytes=6 * TOKEN_BYTES)
    tree.insert(exacts_of(PREFIX, ONE, TWO))
    assert tree.insert(exacts_of((50, 51, 52))) == 1
    assert matched(tree, PREFIX, ONE, TWO) == [PREFIX]
    assert matched(tree, (50, 51, 52)) == [(50, 51, 52)]


def test_what_is_in_use_stays():
    tree = PrefixTree(max_bytes=5 * TOKEN_BYTES)
    tree.insert(exacts_of(PREFIX, ONE))
    with tree.match(MODEL, [PREFIX, ONE]) as match:
        assert tree.insert(exacts_of(PREFIX, TWO)) == 0
        assert tree.stats().declined == 1
        assert matched(tree, PREFIX, ONE) == [PREFIX, ONE]
    match.release()  # a second time changes nothing
    assert tree.insert(exacts_of(PREFIX, TWO)) == 1
    assert matched(tree, PREFIX, ONE) == [PREFIX]


def test_what_cannot_fit_evicts_nothing_and_is_counted():
    tree = PrefixTree(max_bytes=5 * TOKEN_BYTES)
    tree.insert(exacts_of(PREFIX, ONE))
    assert tree.insert(exacts_of(tuple(range(6)), TWO)) == 0
    assert tree.stats()[-2:] == (0, 2)
    assert matched(tree, PREFIX, ONE) == [PREFIX, ONE]


def test_inserting_does_not_evict_its_own_path():
    tree = PrefixTree(max_bytes=4 * TOKEN_BYTES)
    assert tree.insert(exacts_of(PREFIX, TWO, ONE)) == 2
    assert matched(tree, PREFIX, TWO, ONE) == [PREFIX, TWO]


def test_chunk_states_are_refused_by_type():
    with pytest.raises(ValueError, match=r"a ChunkKV, which may be approximate"):
        PrefixTree().insert([made_chunk()])


def test_exact_states_cannot_be_made_by_hand():
    for proof in (None, True, object()):
        with pytest.raises(ValueError, match="only a full prefill makes exact states"):
            ExactKV(made_chunk(), context_digest([]), proof=proof)


def test_a_cache_that_reused_a_chunk_gives_no_exact_states():
    cache = prefill(PREFIX, ONE)
    chunk = torch.ones(HEADS, 3, DIM)
    cache.room(0, 0, slice(2, 5), chunk, chunk)[0].copy_(chunk)
    # Not even after everything was computed again: nobody can prove that it was everything.
    cache.select(torch.arange(5)[None])
    cache.update(torch.ones(1, HEADS, 5, DIM), torch.ones(1, HEADS, 5, DIM), 0)
    with pytest.raises(ValueError, match="never enter the exact prefix cache"):
        cut_exact(cache, 0, [PREFIX, ONE], MODEL)
    with pytest.raises(ValueError, match="never enter the exact prefix cache"):
        cut_exact(RowCache(1, 1, 5), 0, [PREFIX, ONE], MODEL)


def test_states_of_another_context_or_model_are_refused():
    prefix, one, _ = exacts_of(PREFIX, ONE, TWO)
    _, _, other_two = exacts_of(PREFIX, (10, 11, 13), TWO)
    foreign = exacts_of(PREFIX, fingerprint=OTHER_MODEL)[0]
    for index, wrong in ((2, [prefix, one, other_two]), (1, [foreign, one]), (0, [one])):
        with pytest.raises(ValueError, match=f"piece {index} comes from another context or"):
            PrefixTree().insert(wrong)


def test_more_pieces_than_were_computed_are_refused():
    with pytest.raises(ValueError, match="the pieces have 6 tokens, the cache 5 columns"):
        cut_exact(prefill(PREFIX, ONE), 0, [PREFIX, ONE, TWO], MODEL)


def test_an_empty_piece_is_no_piece():
    tree = PrefixTree()
    assert tree.insert(exacts_of((), ONE, (), TWO)) == 2
    assert tree.insert([]) == 0
    assert matched(tree, ONE, (), TWO) == [ONE, TWO]


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

    def joined(*pieces):
        return [token for piece in pieces for token in piece]

    first = RowCache(2, 1, 6, exact=True)
    run(first, joined(PREFIX, ONE, TWO), 0)
    tree = PrefixTree()
    tree.insert(cut_exact(first, 0, [PREFIX, ONE, TWO], MODEL))

    ids = joined(PREFIX, ONE, THREE)
    second = RowCache(2, 1, len(ids), exact=True)
    with tree.match(MODEL, [PREFIX, ONE, THREE]) as match:
        match.load(second, prompt=0)
        assert match.num_tokens == 5
    got = run(second, ids, 5)
    expected = model(torch.tensor(ids)[None], use_cache=False).logits[:, 5:]
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    # What was loaded is exact, so the whole may be stored in turn.
    assert tree.insert(cut_exact(second, 0, [PREFIX, ONE, THREE], MODEL)) == 1
    # And the check can fail: without the chunk's states the answer is another.
    third = RowCache(2, 1, len(ids), exact=True)
    with tree.match(MODEL, [PREFIX]) as match:
        match.load(third, prompt=0)
    assert (run(third, ids, 5) - expected).abs().max() > 1e-4
