"""A prefix tree over a folder: what leaves memory is found again, and only what is sound."""

import random

import pytest
import torch
from cache.made import MODEL, OTHER_MODEL
from cache.prompts import (
    ONE,
    PREFIX,
    STATE,
    STATE_BYTES,
    THREE,
    TOKEN_BYTES,
    TWO,
    exact_of,
    matched,
)

from blocktune.cache import ChunkStore, PrefixTree
from blocktune.cache.store.folder import ChunkFolder


def spilling(folder, tokens, **options):
    return PrefixTree(tokens * TOKEN_BYTES, store=ChunkStore(0, folder), **options)


def test_what_leaves_memory_is_read_from_the_folder(tmp_path):
    tree = spilling(tmp_path, 6)
    tree.insert(exact_of(PREFIX, ONE))
    tree.insert(exact_of(PREFIX, TWO))  # cuts the run behind the prefix
    tree.insert(exact_of(THREE, (40, 41)))
    stats = tree.stats()
    assert (stats.num_tokens, stats.disk_tokens, stats.evictions) == (2 + 4, 3 + 1, 2)
    with tree.match(MODEL, PREFIX + ONE) as match:
        assert (match.num_tokens, match.disk_tokens) == (5, 3)
    assert matched(tree, PREFIX, ONE) == 5  # in memory again, in the place of what was read least
    assert matched(tree, THREE, (40, 41)) == 4
    assert tree.stats().num_bytes <= tree.max_bytes
    assert tree.stats().disk_hit_tokens == 3 + 4
    tree.clear()
    assert matched(tree, PREFIX, ONE) == 0


def test_another_process_finds_the_files_and_only_its_own_models(tmp_path):
    tree = spilling(tmp_path, 5)
    runs = (MODEL, (PREFIX, ONE)), (OTHER_MODEL, (TWO, THREE)), (MODEL, (ONE, TWO))
    for model, pieces in runs:
        tree.insert(exact_of(*pieces, fingerprint=model))
    other = spilling(tmp_path, 50)
    assert matched(other, PREFIX, ONE) == 5
    assert matched(other, TWO, THREE) == 0
    assert matched(other, TWO, THREE, model=OTHER_MODEL) == 3
    assert matched(other, ONE, TWO) == 0  # it is in the memory of the first
    assert matched(other, PREFIX, ONE, model=OTHER_MODEL) == 0


def test_a_prompt_that_turns_off_within_a_file_cuts_it(tmp_path):
    tree = spilling(tmp_path, 6)
    tree.insert(exact_of(PREFIX, ONE))
    tree.insert(exact_of(THREE, TWO, (50,)))
    assert tree.stats().disk_tokens == 5
    assert tree.insert(exact_of(PREFIX, (10, 99))) == 1
    assert matched(tree, PREFIX, ONE) == 5
    assert matched(tree, PREFIX, (10, 99)) == 4
    assert matched(tree, THREE, TWO, (50,)) == 4
    again = spilling(tmp_path, 50)
    assert matched(again, PREFIX, (10, 99)) >= 3


@pytest.mark.parametrize("how", ["removed", "damaged"])
def test_a_file_that_is_lost_takes_what_is_behind_it_along(tmp_path, how):
    tree = spilling(tmp_path, 5)
    tree.insert(exact_of(PREFIX))
    tree.insert(exact_of(PREFIX, ONE))
    tree.insert(exact_of((50, 51, 52, 53)))  # both runs leave
    assert tree.stats().disk_tokens == 5
    first = min(tmp_path.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    first.unlink() if how == "removed" else first.write_bytes(b"damaged")
    assert matched(tree, PREFIX, ONE) == 0
    assert tree.stats().disk_tokens == 0
    assert tree.insert(exact_of(PREFIX, ONE)) == 5
    assert matched(tree, PREFIX, ONE) == 5


def test_a_run_whose_file_the_store_evicted_is_written_again(tmp_path):
    tree = spilling(tmp_path, 5)
    tree.insert(exact_of(PREFIX, ONE))
    tree.insert(exact_of(THREE))  # the first leaves
    assert matched(tree, PREFIX, ONE) == 5  # and is in memory again
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    tree.insert(exact_of((50, 51)))
    assert matched(tree, PREFIX, ONE) == 5


def test_recurrent_states_go_into_the_file(tmp_path):
    tree = PrefixTree(5 * TOKEN_BYTES + STATE_BYTES, store=ChunkStore(0, tmp_path))
    tree.insert(exact_of(PREFIX, ONE, states={5: STATE}))
    tree.insert(exact_of((50, 51, 52)))
    for one in (tree, PrefixTree(store=ChunkStore(0, tmp_path))):
        with one.match(MODEL, PREFIX + ONE) as match:
            assert (match.num_tokens, match.disk_tokens) == (5, 5)
            assert torch.equal(match.state[0], STATE[0])
            assert match.state[1] is None


def test_random_prompts_find_the_same_with_and_without_a_folder(tmp_path):
    rng = random.Random(0)
    large, small = PrefixTree(), spilling(tmp_path, 40)
    for _ in range(150):
        ids = tuple(rng.randint(0, 2) for _ in range(rng.randint(1, 12)))
        assert matched(small, ids) == matched(large, ids)
        large.insert(exact_of(ids))
        small.insert(exact_of(ids))
        stats = small.stats()
        assert stats.num_bytes <= small.max_bytes
        assert stats.num_bytes == stats.num_tokens * TOKEN_BYTES
    assert small.stats().disk_hit_tokens > 0


def test_a_folder_that_cannot_be_written_loses_what_leaves(tmp_path, monkeypatch):
    tree = spilling(tmp_path, 5)
    tree.insert(exact_of(PREFIX, ONE))
    monkeypatch.setattr(ChunkFolder, "write", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    tree.insert(exact_of(THREE))
    assert (matched(tree, PREFIX, ONE), matched(tree, THREE)) == (0, 2)
    assert tree.stats().disk_tokens == 0
