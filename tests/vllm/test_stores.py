"""Chunks in a remote alone, and with fewer bits: the answers are those of the engine over them."""

import pytest
from vllm import SamplingParams
from vllm_cases import SMALL, TINY, close, first_logprobs, questions, worst

from blocktune import Engine
from blocktune.cache.config import CODECS
from blocktune.vllm import ChunkLLM

REMOTE = "memory://chunks"
GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=20)


@pytest.fixture(scope="module")
def llm():
    engine = Engine.from_pretrained(TINY, store=REMOTE, dtype="float32", device="cpu")
    engine.encode(questions(40, 1)[0].chunks)
    engine.store.flush()
    llm = ChunkLLM(TINY, store=REMOTE, **SMALL)
    yield llm
    close(llm)


@pytest.mark.parametrize("codec", CODECS)
def test_answers_are_the_engines(llm, codec):
    examples = questions(41 + CODECS.index(codec), 2)
    options = {"dtype": "float32", "device": "cpu"}
    engine = Engine.from_pretrained(TINY, store=f"{REMOTE},codec={codec}", **options)
    wanted = engine.answer(examples, max_new_tokens=8)
    engine.store.flush()
    plans = [llm.client.read(one).plan for one in examples]
    assert not any(llm.client.missing(plan) for plan in plans)
    made = llm.answer(examples, sampling=GREEDY)
    for one, answer, example in zip(made, wanted, examples, strict=True):
        assert one.token_ids == answer.token_ids
        assert worst(one, first_logprobs(engine, example, "naive")) < 1e-4
        assert one.cached_tokens > 0.8 * one.prompt_tokens


def test_what_a_remote_alone_lacks_fails_and_can_be_encoded(llm):
    [example] = questions(49, 1)
    made = llm.client.read(example)
    with pytest.raises(ValueError, match="could not be loaded"):
        llm.generate([made], GREEDY)
    assert llm.answer([example], sampling=GREEDY)[0].cached_tokens
