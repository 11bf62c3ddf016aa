"""Recycled prompts: found by embedding, admitted by tokens, exact on stock GPT-2 and on Llama."""

import dataclasses

import pytest
import torch
from engine.served import ASK, FORMAT, Ask
from minilm import model_folder
from tiny_llama import tiny_llama
from transformers import GPT2Config, GPT2LMHeadModel

from blocktune.cache import ChunkStore
from blocktune.cache.store.records import Embedder
from blocktune.engine import Engine
from blocktune.methods import build
from blocktune.prompt import Chunk

TOLERANCE = {"rtol": 0, "atol": 1e-5}
MODEL = model_folder()
LONGER = dataclasses.replace(ASK, chunks=(*ASK.chunks, Chunk("And one more passage.")))
OTHER = Ask("Who?", (Chunk("Bread is baked at night."), Chunk("A ship left the port.")))


def gpt2(vocabulary):
    """DialoGPT's architecture in small; weights so large that position and order matter."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=vocabulary,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=512,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=2,
    )
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(params=["gpt2", "llama"])
def engine(request, tokenizer):
    model = gpt2(len(tokenizer)) if request.param == "gpt2" else tiny_llama(tokenizer, 512)
    return Engine(model, tokenizer, format=FORMAT)


@pytest.fixture
def method():
    return build("recycle", model=MODEL)


def whole(engine, ask, method):
    pieces = engine.prompts.pieces(ask, method)
    with torch.no_grad():
        ids = torch.tensor([[*pieces.context, *pieces.query]])
        if engine.state.recurrence is not None:
            return engine.model(ids, use_cache=False).logits[:, -1]
    return engine.next_logits([ask], "full-prefill")


def depth(engine, ask, method, **options):
    return engine.answer([ask], method, max_new_tokens=2, **options)[0].usage.prefix_tokens


def test_a_prompt_resumes_from_the_earlier_one_that_it_continues(engine, method):
    context = len(engine.prompts.pieces(ASK, method).context)
    assert depth(engine, OTHER, method) == 0
    assert depth(engine, ASK, method) == 0
    assert depth(engine, ASK, method) == context
    assert depth(engine, LONGER, method) == context
    assert depth(engine, LONGER, method) == len(engine.prompts.pieces(LONGER, method).context)
    for ask in (ASK, LONGER, OTHER):
        logits = engine.next_logits([ask], method)
        torch.testing.assert_close(logits, whole(engine, ask, method), **TOLERANCE)
    # And the check can fail: another context gives other logits.
    assert (whole(engine, LONGER, method) - whole(engine, ASK, method)).abs().max() > 1e-3


def test_usage_says_what_was_saved(engine, method):
    first, second = (engine.answer([ASK], method, max_new_tokens=3)[0] for _ in "ab")
    assert second.token_ids == first.token_ids
    assert 0 < second.usage.flops < first.usage.flops
    assert (first.usage.recompute_ratio, second.usage.recompute_ratio) == (1.0, 0.0)
    assert second.usage.bytes_read > 0


def test_the_nearest_prompt_is_refused_unless_it_is_a_prefix_to_the_last_token(engine, method):
    """Almost the same text is nearest of all, and gives nothing."""
    depth(engine, ASK, method)
    changed = Chunk(ASK.chunks[-1].text.replace("Noel", "Joel"), ASK.chunks[-1].title)
    near = dataclasses.replace(ASK, chunks=(*ASK.chunks[:-1], changed))
    logits = engine.next_logits([near], method)
    torch.testing.assert_close(logits, whole(engine, near, method), **TOLERANCE)
    fresh = Engine(engine.model, engine.tokenizer, format=FORMAT)
    depth(fresh, ASK, method)
    assert depth(fresh, near, method) == 0


def test_more_candidates_find_a_prefix_that_is_not_the_nearest(engine):
    one, three = (build("recycle", model=MODEL, candidates=n) for n in (1, 3))
    short = dataclasses.replace(ASK, chunks=ASK.chunks[:1])
    decoys = [
        dataclasses.replace(LONGER, chunks=(Chunk(f"{number}."), *LONGER.chunks))
        for number in (1, 2)
    ]
    for ask in (short, *decoys):
        depth(engine, ask, one)
    assert depth(engine, LONGER, three) == len(engine.prompts.pieces(short, three).context)


def test_tenants_share_nothing(engine, method):
    depth(engine, ASK, method)
    assert depth(engine.salted("acme"), ASK, method) == 0
    assert depth(engine.salted("acme"), ASK, method) > 0


def test_prompts_outlive_the_process_in_a_folder(engine, method, tmp_path):
    def own() -> Engine:
        store = ChunkStore(folder=tmp_path)
        return Engine(engine.model, engine.tokenizer, format=FORMAT, store=store)

    assert depth(own(), ASK, method) == 0
    again = own()
    assert depth(again, LONGER, method) == len(engine.prompts.pieces(ASK, method).context)
    logits = again.next_logits([LONGER], method)
    torch.testing.assert_close(logits, whole(engine, LONGER, method), **TOLERANCE)


def test_codecs_leave_exact_states_alone(engine, method, tmp_path):
    store = ChunkStore.open(f"{tmp_path},codec=fp8")
    own = Engine(engine.model, engine.tokenizer, format=FORMAT, store=store)
    depth(own, ASK, method)
    assert depth(own, ASK, method) > 0
    logits = own.next_logits([ASK], method)
    torch.testing.assert_close(logits, whole(engine, ASK, method), **TOLERANCE)


def test_a_store_without_room_still_answers(engine, method):
    tight = ChunkStore(max_bytes=3000)
    own = Engine(engine.model, engine.tokenizer, format=FORMAT, store=tight)
    assert [depth(own, ASK, method) for _ in "ab"] == [0, 0]


def test_an_absolute_model_reuses_no_chunk(tokenizer):
    engine = Engine(gpt2(len(tokenizer)), tokenizer, format=FORMAT)
    with pytest.raises(ValueError, match=r"'naive' reuses chunks, .* no rotary position embedding"):
        engine.answer([ASK], "naive")
    with pytest.raises(ValueError, match="no rotary position embedding"):
        engine.encode(["text"])


def test_a_model_that_is_not_there_is_refused_in_one_line(engine, tmp_path):
    with pytest.raises(ValueError, match=r"cannot load an embedding model from '.*none'") as error:
        engine.answer([ASK], build("recycle", model=str(tmp_path / "none")))
    assert "\n" not in str(error.value)


def test_an_embedding_is_computed_once(tmp_path, monkeypatch):
    embed = Embedder(MODEL, ChunkStore(folder=tmp_path))
    first = embed(["Who?", "Where?", "Who?"])
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    torch.testing.assert_close(first.norm(dim=1), torch.ones(3), rtol=0, atol=1e-5)
    again = Embedder(MODEL, ChunkStore(folder=tmp_path))
    monkeypatch.setattr(again.model, "encode", None)
    assert torch.equal(again(["Where?"])[0], first[1])
    with pytest.raises(TypeError):
        again(["When?"])
