"""Chunks encoded after the known chunks that are most like them."""

import dataclasses

import pytest
import torch
from engine.served import ASK, FORMAT, dense_logits, engine_of, served_spans
from families import FAMILIES
from tiny_llama import tiny_llama

from blocktune.engine import Engine
from blocktune.extras.fusionrag import MOST, KnownChunks
from blocktune.layout import Kind
from blocktune.methods import ServedModel, build, compose
from blocktune.prompt import Chunk

ROOMY = ServedModel(None, None, 1 << 30)
TOLERANCE = {"rtol": 0, "atol": 1e-4}


@pytest.fixture
def engine(tokenizer):
    return engine_of(FAMILIES["llama"](), tokenizer)


def contexts(engine, ask, method):
    """The tokens that each chunk of a prompt is encoded after, without the prefix."""
    pieces = engine.prompts.pieces(ask, method)
    after = method.history.lookup(engine.store, engine.fingerprint, pieces, ROOMY)
    assert all(ids[: len(pieces.prefix)] == pieces.prefix for ids in after)
    return pieces.chunks, [ids[len(pieces.prefix) :] for ids in after]


def test_rare_tokens_make_chunks_alike_and_length_does_not():
    known, chunk = KnownChunks(), (1, 2, 3, 9)
    long = (1, 2, 3, *range(200, 260))
    known.add([chunk, long, (9, 30), (8,), *((1, 2, 3, 100 + i) for i in range(20))])
    found = known.like(chunk, 99)
    assert (found[0], found[-1], len(found)) == ((9, 30), long, 22)
    assert known.like((8,), 3) == []


def test_what_was_asked_for_longest_ago_is_forgotten_first():
    known = KnownChunks()
    known.add([(1, index) for index in range(2, MOST + 2)])
    known.add([(1, 2), (1, MOST + 2)])
    assert len(known._chunks) == MOST
    assert (1, 3) not in known.like((1, 2), MOST)
    assert (1, 2) in known.like((1, 4), MOST)
    assert 3 not in known._with_token


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_it_matches_the_dense_oracle_with_the_neighbours_as_blank_rows(family, tokenizer):
    engine = engine_of(FAMILIES[family](), tokenizer)
    method = build("fusionrag", neighbours=1, ratio=0.3)
    served, spans = served_spans(engine, ASK, method)
    assert spans
    prompt = engine.lay_out(engine.prompts.pieces(ASK, method), method)
    chunks, after = contexts(engine, ASK, method)
    assert all(ids in set(chunks) - {chunk} for chunk, ids in zip(chunks, after, strict=True))
    assert int((prompt.layout.kind == Kind.BLANK).sum()) > sum(map(len, after))
    torch.testing.assert_close(served, dense_logits(engine, ASK, method, spans), **TOLERANCE)


def test_without_neighbours_it_encodes_after_the_prefix(engine):
    method = compose(build("fusionrag", neighbours=0), select=None)
    expected = engine.next_logits([ASK], "naive + layout shared_prefix=true")
    torch.testing.assert_close(engine.next_logits([ASK], method), expected, **TOLERANCE)


def test_a_chunk_served_before_is_a_neighbour_and_costs_the_prompt_nothing(engine):
    method = build("fusionrag", neighbours=1)
    before = engine.answer([ASK], method, max_new_tokens=1)[0].usage
    twin = Chunk("Anna Belt was born in Port Alder and studied law there.", "Anna Belt")
    engine.answer([dataclasses.replace(ASK, chunks=(twin,))], method, max_new_tokens=1)
    chunks, after = contexts(engine, ASK, method)
    assert after[0] not in chunks
    first, again = (engine.answer([ASK], method, max_new_tokens=1)[0].usage for _ in range(2))
    assert (first.chunk_hits, again.chunk_hits) == (2, 3), "the first chunk has a new neighbour"
    assert again.layer_tokens == before.layer_tokens
    with pytest.raises(ValueError, match="neighbours must be a whole number"):
        build("fusionrag", neighbours=-1)


def test_a_batch_finds_the_neighbours_that_its_prompts_find_in_turn(engine):
    other = dataclasses.replace(ASK, chunks=(ASK.chunks[0], Chunk("Frozen Shore was shot.")))
    method = build("fusionrag", neighbours=1)
    engine.next_logits([ASK, other], method)
    together = engine.next_logits([ASK, other], method)
    alone = torch.cat([engine.next_logits([ask], method) for ask in (ASK, other)])
    torch.testing.assert_close(together, alone, **TOLERANCE)


def test_a_prompt_knows_those_served_before_it_alone(engine, monkeypatch):
    added, add = [], KnownChunks.add
    monkeypatch.setattr(
        KnownChunks, "add", lambda self, chunks: (added.append(chunks), add(self, chunks))
    )
    method = build("fusionrag", neighbours=1)
    other = dataclasses.replace(ASK, chunks=(Chunk("Frozen Shore was shot."), ASK.chunks[0]))
    asks = [ASK, other]
    usages = [a.usage for a in engine.answer(asks, method, max_new_tokens=1, batch_size=1)]
    assert added == [engine.prompts.pieces(ask, method).chunks for ask in asks]
    assert all(usage.ttft.prompt_s > 0 for usage in usages)
    assert engine.prefilled([ASK], method).prefill.chunk_probe is None


def test_emptied_caches_forget_the_chunks_too(engine):
    method = build("fusionrag", neighbours=1)
    engine.next_logits([ASK], method)
    engine.forget()
    alone = dataclasses.replace(ASK, chunks=ASK.chunks[:1])
    assert contexts(engine, alone, method)[1] == [()]


def test_neighbours_that_do_not_fit_into_the_context_are_left_out(tokenizer):
    model = tiny_llama(tokenizer, 128, initializer_range=0.2)
    engine = Engine(model, tokenizer, format=FORMAT)
    method = build("fusionrag", neighbours=3)
    for text in ("Noel Lane shot it. " * 6, "Noel Lane shot it in May. " * 6, "Noel Lane"):
        other = dataclasses.replace(ASK, chunks=(Chunk(text),))
        engine.answer([other], method, max_new_tokens=1)
    own = dataclasses.replace(ASK, chunks=(Chunk("Noel Lane shot a film. " * 3),))
    pieces = engine.prompts.pieces(own, method)
    prompt = engine.lay_out(pieces, method)
    blanks = prompt.layout.kind == Kind.BLANK
    longest = len(pieces.prefix) + len(pieces.chunks[0]) + int(blanks.sum())
    assert len(pieces.prefix) < int(blanks.sum())
    assert longest <= 128
    assert engine.answer([own], method, max_new_tokens=1)
