"""Whole answers: given again for the same prompt, or a similar question, and to nobody else."""

import dataclasses

import pytest
import torch
from engine.served import ASK, FORMAT, SHORT
from minilm import model_folder
from tiny_llama import tiny_llama

from blocktune.cache import ChunkStore
from blocktune.cache.responses import ResponseCache
from blocktune.cache.store.records import Embedder, Nearest
from blocktune.engine import Engine, Sampling
from blocktune.engine.recall import Recall
from blocktune.methods import build

SIMILAR = dataclasses.replace(ASK, question="Who was the director of the film?")
FAR = dataclasses.replace(ASK, question="What is the capital of France?")
MODEL = model_folder()


@pytest.fixture
def engine(tokenizer):
    engine = Engine(tiny_llama(tokenizer, 512), tokenizer, format=FORMAT)
    engine.responses = ResponseCache(engine.store)
    return engine


def asked(engine, ask=ASK, method="naive", **options):
    return engine.answer([ask], method, **{"max_new_tokens": 4} | options)[0]


def test_the_same_prompt_is_answered_without_the_model(engine, monkeypatch):
    first = asked(engine)
    monkeypatch.setattr(engine.model, "forward", None)
    again = asked(engine)
    assert (again.text, again.token_ids, again.chunks) == (first.text, first.token_ids, ASK.chunks)
    assert (first.usage.recalled, again.usage.recalled) == (None, 1.0)
    assert (again.usage.flops, again.usage.recompute_ratio) == (0, 0.0)
    assert again.usage.answer_tokens == len(first.token_ids)
    assert "".join(engine.stream(ASK, "naive", max_new_tokens=4)) == first.text


def test_a_streamed_answer_is_kept(engine):
    streamed = "".join(engine.stream(ASK, "naive", max_new_tokens=4))
    answer = asked(engine)
    assert (answer.usage.recalled, answer.text) == (1.0, streamed)


def test_without_a_cache_every_answer_is_made(tokenizer):
    engine = Engine(tiny_llama(tokenizer, 512), tokenizer, format=FORMAT)
    assert [asked(engine).usage.recalled for _ in "ab"] == [None, None]


def test_what_decides_an_answer_separates_them(engine):
    asked(engine)
    others = [
        asked(engine, method="full-prefill"),
        asked(engine, method="naive + first-k 2"),
        asked(engine, max_new_tokens=3),
        asked(engine, SIMILAR),
        asked(engine, dataclasses.replace(ASK, chunks=ASK.chunks[::-1])),
        asked(engine, SHORT),
        asked(engine, sampling=Sampling(0.7, seed=0)),
        asked(engine.salted("acme")),
        asked(engine.decoding_on("fp8")),
    ]
    assert [answer.usage.recalled for answer in others] == [None] * len(others)
    assert asked(engine).usage.recalled == 1.0
    assert asked(engine.salted("acme")).usage.recalled == 1.0


def test_chunks_that_join_to_the_same_tokens_are_other_chunks(engine):
    pieces = engine.prompts.pieces(ASK, build("naive"))
    one = pieces._replace(chunks=(sum(pieces.chunks, ()),))
    first, other = (
        Recall.of(engine.responses, engine.state, build("naive"), Sampling(), 4, of, "Who?")
        for of in (pieces, one)
    )
    first.keep("x", [1])
    assert first.answer().token_ids == (1,)
    assert other.answer() is None


def test_drawn_answers_are_kept_with_a_seed_only(engine):
    loose, fixed, other = (Sampling(0.7, seed=seed) for seed in (None, 0, 1))
    assert [asked(engine, sampling=loose).usage.recalled for _ in "ab"] == [None, None]
    first = asked(engine, sampling=fixed)
    again, changed = asked(engine, sampling=fixed), asked(engine, sampling=other)
    assert (first.usage.recalled, again.usage.recalled, changed.usage.recalled) == (None, 1.0, None)
    assert again.token_ids == first.token_ids
    # The second of two prompts draws from another stream.
    pair = engine.answer([SHORT, ASK], "naive", max_new_tokens=4, sampling=fixed)
    assert pair[1].usage.recalled is None


def test_a_batch_mixes_both_kinds_in_order(engine):
    alone = [asked(engine, ask).text for ask in (ASK, SHORT)]
    both = engine.answer([SHORT, FAR, ASK], "naive", max_new_tokens=4)
    assert [answer.usage.recalled for answer in both] == [1.0, None, 1.0]
    assert [both[2].text, both[0].text] == alone
    assert [answer.chunks for answer in both] == [SHORT.chunks, FAR.chunks, ASK.chunks]


def test_a_similar_question_over_the_same_chunks_gets_the_answer(engine):
    engine.responses = ResponseCache(engine.store, 0.8, MODEL)
    first = asked(engine)
    near = asked(engine, SIMILAR)
    assert near.text == first.text
    assert 0.8 <= near.usage.recalled < 1
    assert asked(engine, FAR).usage.recalled is None
    assert asked(engine.salted("acme"), SIMILAR).usage.recalled is None
    other = dataclasses.replace(SIMILAR, chunks=ASK.chunks[:2])
    assert asked(engine, other).usage.recalled is None
    strict = ResponseCache(engine.store, 0.999, MODEL)
    engine.responses = strict
    assert asked(engine, SIMILAR).usage.recalled is None


def test_questions_of_another_embedding_model_are_not_compared(engine):
    """A folder may hold another model later; its vectors may also have another size."""

    class Fake:
        def __init__(self, fingerprint, size):
            self.fingerprint, self.size = fingerprint, size

        def __call__(self, texts):
            return torch.nn.functional.normalize(torch.ones(len(texts), self.size))

    engine.store.notes[Embedder, "folder"] = Fake("a", 3)
    engine.responses = ResponseCache(engine.store, 0.8, "folder")
    for recalled, fake in ((None, Fake("a", 3)), (1.0, Fake("a", 3)), (None, Fake("b", 4))):
        engine.store.notes[Embedder, "folder"] = fake
        ask = dataclasses.replace(ASK, question=f"Question of {fake.size}, {recalled}?")
        assert asked(engine, ask).usage.recalled == (recalled and pytest.approx(recalled))


def test_processes_with_one_folder_keep_what_the_others_list(tmp_path):
    lists = [Nearest(ChunkStore(folder=tmp_path), "a" * 64, most=3) for _ in range(2)]
    keys = [f"{n:064x}" for n in range(4)]
    for n, key in enumerate(keys):  # in turn
        lists[n % 2].add(key, n, torch.eye(4)[n])
    lists[0].add(keys[2], 5, torch.eye(4)[2])
    for one in (lists[0], Nearest(ChunkStore(folder=tmp_path), "a" * 64)):
        found = [next(one.find(torch.eye(4)[n])) for n in (1, 2, 3)]
        assert found == [(keys[1], 1, 1.0), (keys[2], 5, 1.0), (keys[3], 3, 1.0)]


def test_answers_outlive_the_process_and_a_damaged_one_is_made_again(engine, tmp_path):
    def own(similar=None) -> Engine:
        store = ChunkStore(folder=tmp_path)
        other = Engine(engine.model, engine.tokenizer, format=FORMAT, store=store)
        other.responses = ResponseCache(store, similar, MODEL)
        return other

    first = asked(own(0.8))
    assert asked(own()).text == first.text
    assert asked(own()).usage.recalled == 1.0
    assert asked(own(0.8), SIMILAR).usage.recalled < 1
    for file in tmp_path.rglob("*.safetensors"):
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(bytes(data))
    broken = asked(own())
    assert (broken.usage.recalled, broken.text) == (None, first.text)


def test_a_store_without_room_still_answers(tokenizer):
    engine = Engine(tiny_llama(tokenizer, 512), tokenizer, format=FORMAT)
    engine.responses = ResponseCache(ChunkStore(max_bytes=8))
    assert [asked(engine).usage.recalled for _ in "ab"] == [None, None]


@pytest.mark.parametrize("text", ["semantic", "semantic:2", "semantic:x", "exact:1", "all"])
def test_an_option_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match="a response cache is 'exact' or 'semantic:THRESHOLD"):
        ResponseCache.parse(text, ChunkStore())


def test_options_are_read():
    store = ChunkStore()
    assert ResponseCache.parse("exact", store) == ResponseCache(store)
    made = ResponseCache.parse(f"semantic:0.95:{MODEL}", store)
    assert made == ResponseCache(store, 0.95, MODEL)
    with pytest.raises(ValueError, match="cannot load an embedding model"):
        ResponseCache.parse("semantic:0.95:/nowhere", store)
