"""SemShareKV: similar prompts share states token by token, moved to where each token stands."""

import dataclasses
import time

import pytest
import torch
from engine.served import ASK, FORMAT, SHORT
from largest_tensor import LargestTensor
from tiny_llama import tiny_llama

from blocktune.engine import Engine
from blocktune.extras import semsharekv
from blocktune.extras.semsharekv import BITS, References
from blocktune.layout import Kind
from blocktune.methods import ServedModel, build
from blocktune.prompt import Chunk, Pieces

TOLERANCE = {"rtol": 0, "atol": 1e-5}


def changed(index: int, **fields):
    """The question with one passage changed."""
    chunks = list(ASK.chunks)
    chunks[index] = dataclasses.replace(chunks[index], **fields)
    return dataclasses.replace(ASK, chunks=tuple(chunks))


NEAR = changed(2, text="The film Frozen Shore was directed by Walter Gray.")
MOVED = changed(0, text="The late Anna Belt was born in Port Alder and studied there.")


@pytest.fixture
def engine(tokenizer):
    return Engine(tiny_llama(tokenizer, 512, initializer_range=0.2), tokenizer, format=FORMAT)


def logits(engine, ask, **fields):
    return engine.next_logits([ask], build("semsharekv", **fields))


def ratio(engine, ask, **fields):
    method = build("semsharekv", **fields)
    return engine.answer([ask], method, max_new_tokens=1)[0].usage.recompute_ratio


def test_the_first_prompt_is_computed_in_full_and_serves_the_same_one_exactly(engine):
    full = engine.next_logits([ASK], "full-prefill")
    torch.testing.assert_close(logits(engine, ASK), full, **TOLERANCE)
    assert ratio(engine, ASK) == 1.0  # `next_logits` ends before a prompt is learnt
    assert ratio(engine, ASK, ratio=0.0) == 0.0
    torch.testing.assert_close(logits(engine, ASK, ratio=0.0), full, **TOLERANCE)


def test_a_similar_prompt_takes_its_states_and_recomputes_a_share(engine):
    ratio(engine, ASK)
    full = engine.next_logits([NEAR], "full-prefill")
    nothing, share, all_of = (logits(engine, NEAR, ratio=r) for r in (0.0, 0.4, 1.0))
    torch.testing.assert_close(all_of, full, **TOLERANCE)
    assert (nothing - full).abs().max() > 1e-3
    assert (share - full).norm() < (nothing - full).norm()
    assert 0 < ratio(engine, NEAR, ratio=0.4) < 1


def test_a_prompt_that_is_not_similar_is_computed_in_full(engine):
    ratio(engine, ASK)
    assert ratio(engine, SHORT) == 1.0
    assert ratio(engine, NEAR, threshold=0.999) == 1.0
    assert ratio(engine, NEAR, ratio=0.0, threshold=0.999) == 0.0  # it was learnt just now


def test_matched_tokens_have_the_keys_of_their_own_positions(engine):
    """Layer 0 depends on token and position alone, so there a match of the same token is exact."""
    ratio(engine, ASK)
    method = build("semsharekv", ratio=0.0, threshold=0.4)
    pieces = engine.prompts.pieces(MOVED, method)
    run = engine.start([pieces], method)
    whole = engine.start([pieces], "full-prefill")
    # All but the two words that were not there before.
    context = torch.tensor(pieces.context)
    known = torch.isin(context, torch.tensor(engine.prompts.pieces(ASK, method).context))
    assert known.float().mean() > 0.9
    is_context = (run.columns.kind[0] != Kind.QUERY)[: len(context)]
    assert bool(is_context.all())
    errors = []
    for kind in ("keys", "values"):
        mine, wanted = (
            getattr(r.cache.layers[0], kind)[0, :, : len(context)] for r in (run, whole)
        )
        errors.append((mine - wanted).abs().amax((0, 2)))
    right = (torch.stack(errors) < 1e-4).all(0)
    assert right[known].float().mean() > 0.8
    assert not right[~known].any()
    deeper = [r.cache.layers[1].keys[0, :, : len(context)] for r in (run, whole)]
    assert (deeper[0] - deeper[1]).abs().max() > 1e-3  # their context was another one


def test_long_prompts_are_matched_in_blocks(engine):
    model = ServedModel(engine.model.get_input_embeddings(), engine.state.rope, 1 << 20)
    ids, earlier = tuple(n % 100 for n in range(3000)), References(engine.store)
    earlier.prompts[ids] = None
    with LargestTensor() as seen:
        similarity, other, matches = earlier.nearest(Pieces((), (ids,), (1,)), model)
    assert (similarity, other) == (pytest.approx(1), ids)
    assert matches.tolist() == list(range(3000))
    assert seen.numel <= 3000 * BITS


def test_tenants_and_stores_share_nothing(engine):
    ratio(engine, ASK)
    assert ratio(engine.salted("acme"), ASK) == 1.0
    assert ratio(engine, ASK, ratio=0.0) == 0.0
    engine.forget()
    assert ratio(engine, ASK, ratio=0.0) == 1.0  # the reference left the store


def test_only_the_last_prompts_are_references(engine):
    for ask in (ASK, SHORT):
        ratio(engine, ask, references=1)
    assert ratio(engine, ASK, ratio=0.0, references=1) == 1.0


def test_a_batch_answers_as_its_prompts_alone(engine):
    ratio(engine, ASK)
    method = build("semsharekv")
    alone = [engine.answer([a], method, max_new_tokens=4)[0] for a in (NEAR, MOVED)]
    together = engine.answer([NEAR, MOVED], method, max_new_tokens=4)
    assert [a.token_ids for a in together] == [a.token_ids for a in alone]


def test_matching_and_moving_states_count_in_the_time_to_the_first_token(engine, monkeypatch):
    looked_up = []

    def slow(function):
        return lambda *args: (time.sleep(0.02), looked_up.append(function), function(*args))[2]

    nearest = References.nearest
    method = build("semsharekv", warm_up=1, threshold=0.0)
    monkeypatch.setattr(References, "nearest", slow(nearest))
    monkeypatch.setattr(semsharekv, "assemble", slow(semsharekv.assemble))
    answer = engine.answer([ASK], method, max_new_tokens=1)[0]
    assert answer.usage.chunk_hits == 3
    assert answer.usage.ttft.load_s >= 3 * 0.02
    assert answer.usage.ttft.prompt_s >= 0.02
    assert looked_up.count(nearest) == 1, "once, among the prompts before"
    run = engine.prefilled([SHORT], method)  # in full
    assert run.prefill.chunk_probe is None, "attention to chunks costs time, and nobody reads it"


def test_no_approximate_chunk_enters_the_store(engine):
    ratio(engine, ASK)
    before = set(engine.store.held())
    ratio(engine, NEAR)
    assert set(engine.store.held()) == before
    naive = engine.answer([NEAR], "naive", max_new_tokens=1)[0].usage
    assert naive.chunk_hits == 0


def test_warm_up_gives_a_question_a_history(engine):
    cold, warm = (ratio(engine.salted(str(n)), ASK, warm_up=n, threshold=0.5) for n in (0, 1))
    assert (cold, warm < 1) == (1.0, True)


def test_one_chunk_and_no_prefix(engine, tokenizer):
    bare = engine.reworded(dataclasses.replace(FORMAT, instruction=""))
    one = dataclasses.replace(ASK, chunks=(Chunk("Noel Fisher lives in Port Alder now."),))
    other = dataclasses.replace(ASK, chunks=(Chunk("Noel Fisher lives in Lower Kirby now."),))
    ratio(bare, one)
    full = bare.next_logits([other], "full-prefill")
    made = bare.next_logits([other], build("semsharekv", ratio=1.0, threshold=0.5))
    torch.testing.assert_close(made, full, **TOLERANCE)
