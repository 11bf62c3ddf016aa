"""Stored layer inputs equal those of a plain forward over the chunk alone."""

import pytest
import torch
from engine.served import ASK, engine_of
from engine.test_selection import deep
from families import FAMILIES

from blocktune.attention import DensePlan
from blocktune.cache import ChunkStates, ChunkStore, states_key
from blocktune.engine.encode import Piece, alone
from blocktune.engine.usage import Stopwatch
from blocktune.prompt import stack

PIECES = [Piece((11, 12, 13, 14, 15)), Piece((21, 22, 23), blanks=(9, 8)), Piece((31,))]


def found(engine, layers=(1,), pieces=PIECES):
    watch = Stopwatch(torch.device("cpu"))
    return engine.state.encoder.find(pieces, watch, layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_stored_states_match_what_enters_the_layer(family, tokenizer):
    engine = engine_of(FAMILIES[family](), tokenizer)
    states = found(engine, (0, 1)).states
    assert set(states) == {(piece, layer) for piece in PIECES for layer in (0, 1)}
    for piece in PIECES:
        batch = stack([alone(piece)], 0)
        with torch.no_grad():
            seen = engine.model(
                batch.input_ids,
                position_ids=batch.layout.position,
                plan=DensePlan(batch.layout),
                use_cache=False,
                output_hidden_states=True,
            ).hidden_states
        for layer in (0, 1):
            own = seen[layer][0, len(piece.blanks) :]
            torch.testing.assert_close(states[piece, layer].states, own, rtol=0, atol=1e-5)


def test_states_are_made_on_demand_and_found_again_in_the_folder(tokenizer, tmp_path):
    engine = engine_of(FAMILIES["llama"](), tokenizer, store=ChunkStore(folder=tmp_path))
    assert found(engine, ()).misses == set(PIECES)
    same = found(engine, ())
    assert (same.tiers.keys(), same.misses) == (set(PIECES), set())
    assert found(engine, (1,)).misses == set(PIECES)  # encoded once more, with its states
    again = engine_of(FAMILIES["llama"](), tokenizer, store=ChunkStore(folder=tmp_path))
    first, second = found(engine), found(again)
    assert (second.tiers.keys(), second.misses) == (set(PIECES), set())
    for key, entry in first.states.items():
        assert torch.equal(entry.states, second.states[key].states)


@pytest.mark.parametrize("name", ["droidspeak", "droidspeak-clc restart_layer=2"])
def test_chunks_are_encoded_ahead_with_the_states_that_a_method_reads(name, tokenizer):
    engine = engine_of(deep("llama"), tokenizer)
    assert engine.encode(ASK.chunks, method=name).num_encoded == 3
    usage = engine.answer([ASK], name, max_new_tokens=1)[0].usage
    assert (usage.chunk_hits, usage.chunk_misses) == (3, 0)


@pytest.mark.parametrize("name", ["cache-craft", "semsharekv", "fusionrag"])
def test_nothing_is_encoded_ahead_for_a_method_that_takes_chunks_from_its_prompts(name, tokenizer):
    engine = engine_of(FAMILIES["llama"](), tokenizer)
    with pytest.raises(ValueError, match=f"'{name}' reuses no chunks that were encoded ahead"):
        engine.encode(ASK.chunks, method=name)


def test_a_chunk_whose_states_were_lost_is_encoded_again(tokenizer):
    engine = engine_of(FAMILIES["llama"](), tokenizer)
    before = found(engine).states
    encoder = engine.state.encoder
    key = states_key(encoder.key(PIECES[0]), 1)
    foreign = ChunkStates(torch.zeros(5, 32), 1, torch.tensor([1, 2, 3, 4, 5]), engine.fingerprint)
    engine.store.put(key, foreign)
    after = found(engine)
    assert after.misses == {PIECES[0]}
    new, old = after.states[PIECES[0], 1].states, before[PIECES[0], 1].states
    torch.testing.assert_close(new, old, rtol=0, atol=1e-5)  # of another batch: rounding differs
