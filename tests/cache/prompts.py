"""Prompts of a few tokens whose exact states say which token of which prompt they are."""

import torch
from cache.made import MODEL

from blocktune.cache import RowCache, cut_exact

HEADS, DIM = 1, 2
TOKEN_BYTES = 2 * HEADS * DIM * 4 + 8  # keys and values of one layer, and the id
STATE = (torch.ones(1, 3, 4), None)
STATE_BYTES = 48

PREFIX, ONE, TWO, THREE = (1, 2), (10, 11, 12), (20,), (30, 31)


def prefill(tokens):
    """What a full prefill leaves: states that say which column of which prompt they are."""
    cache = RowCache(1, 1, len(tokens), exact=True)
    cache.select(torch.arange(len(tokens))[None])
    states = torch.tensor(tokens, dtype=torch.float32)[None, None, :, None].expand(
        1, HEADS, -1, DIM
    )
    cache.update(states, -states, 0)
    return cache


def exact_of(*pieces, fingerprint=MODEL, start=0, states=None):
    ids = sum(pieces, ())
    return cut_exact(prefill(ids), 0, ids, fingerprint, start=start, states=states)


def matched(tree, *pieces, model=MODEL):
    """Tokens known of a prompt; their keys must say so, too."""
    ids = sum(pieces, ())
    cache = RowCache(1, 1, len(ids) + 1, exact=True)
    with tree.match(model, ids) as match:
        match.load(cache, 0)
        if match.num_tokens:
            keys = cache.layers[0].keys[0, 0, : match.num_tokens, 0]
            assert keys.tolist() == list(ids[: match.num_tokens])
        return match.num_tokens
