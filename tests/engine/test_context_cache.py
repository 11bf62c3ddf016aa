"""Stock `generate` over a cached context writes what the engine answers."""

import pytest
import torch
from engine.served import ASK, SHORT, engine_of
from families import FAMILIES

from blocktune.attention import attach, detach
from blocktune.attention.interface import cache_argument
from blocktune.check import subjects
from blocktune.check.serving import ASK as CLAIM
from blocktune.methods import Cached, build
from blocktune.testing import small_engine

TOKENS = 8
METHODS = (
    "naive",
    "epic 4",
    "cacheblend 30 %",
    "naive + layout num_blanks=2",
    "naive + layout placement=reserved slot=40",
    "naive + layout placement=parallel",
    "full-prefill",
)


def generated(engine, context, question=None):
    inputs = context.inputs(question)
    detach(engine.model)  # nothing of blocktune is left in it
    output = engine.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    attach(engine.model)
    return tuple(output[0, inputs["input_ids"].shape[1] :].tolist())


def answered(engine, ask, method):
    return engine.answer([ask], method, max_new_tokens=TOKENS)[0].token_ids


def sliding(family, tokenizer):
    config = FAMILIES[family]()
    if family == "mistral":  # every layer slides: the question must still reach a chunk
        config.sliding_window = 40
    return engine_of(config, tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_writes_the_engines_tokens(family, tokenizer):
    engine = sliding(family, tokenizer)
    assert family != "mistral" or engine.model.config.sliding_window == 40
    for name in METHODS:
        method = build(name)
        context = engine.cache(ASK.chunks, method)
        answer = answered(engine, ASK, method)
        assert len(answer) > 2
        assert generated(engine, context, ASK.question) == answer, name


@pytest.mark.parametrize(
    "name",
    ["query-attention", "cacheblend-lmcache", "oracle", "cache-craft"],
)
def test_a_choice_by_the_question_is_cached_for_this_question(name, tokenizer):
    engine = sliding("gemma2", tokenizer)
    method = build(name, ratio=0.3) if name != "cache-craft" else build(name)
    if method.select().needs_question:
        with pytest.raises(ValueError, match="question="):
            engine.cache(ASK.chunks, method)
    context = engine.cache(ASK.chunks, method, ASK.question)
    assert generated(engine, context) == answered(engine, ASK, method)
    with pytest.raises(ValueError, match="made for the question"):
        context.inputs(SHORT.question)


@pytest.mark.parametrize("name", ["kvlink", "kv-packet", "turborag", "block-attention"])
def test_learned_tokens_are_in_the_cache(name):
    engine = small_engine(build(name).weights)
    context = engine.cache(ASK.chunks, name)
    assert generated(engine, context, ASK.question) == answered(engine, ASK, name)
    # Unless another one is named, it is the method that the adapter was trained for.
    own = {"turborag": "kv-packet"}.get(name, name)
    assert answered(engine, ASK, None) == answered(engine, ASK, own)


def test_a_prompt_that_begins_with_its_question_has_an_empty_cache():
    engine = small_engine(bare=True)
    context = engine.cache(ASK.chunks, "no-context")
    assert context.input_ids.shape == (1, 0)
    assert generated(engine, context, ASK.question) == answered(engine, ASK, "no-context")


def test_one_cache_serves_many_questions_and_stays_as_it_was(tokenizer):
    engine = engine_of(FAMILIES["llama"](), tokenizer)
    context = engine.cache(ASK.chunks, "naive")
    length, keys = context.past_key_values.get_seq_length(), context.past_key_values.layers[0].keys
    before = keys.clone()
    for question in (ASK.question, "Where was it shot?", ASK.question):
        ask = type(ASK)(question, ASK.chunks)
        assert generated(engine, context, question) == answered(engine, ask, "naive")
    assert context.past_key_values.get_seq_length() == length == context.input_ids.shape[1]
    assert torch.equal(keys, before)
    with pytest.raises(ValueError, match="needs a question"):
        context.inputs()
    with pytest.raises(ValueError, match='"question" must be a non-blank'):
        context.inputs("")
    inputs = context.inputs("Who?") | {cache_argument(engine.model): context.past_key_values}
    engine.model.generate(**inputs, max_new_tokens=2)
    with pytest.raises(ValueError, match="past_key_values was continued"):
        context.inputs("Who?")


def test_positions_with_gaps_are_needed(tokenizer):
    """The guard of the guard: generate's own positions give other tokens."""
    engine = engine_of(FAMILIES["llama"](), tokenizer)
    method = build("naive + layout placement=reserved slot=40")
    inputs = engine.cache(ASK.chunks, method).inputs(ASK.question)
    assert int(inputs["position_ids"].max()) > inputs["input_ids"].shape[1]
    del inputs["position_ids"]
    output = engine.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    tokens = tuple(output[0, inputs["input_ids"].shape[1] :].tolist())
    assert tokens != answered(engine, ASK, method)


def cacheable():
    methods = subjects()
    plain = (name for name in methods if methods[name].reshape() is None)
    return [name for name in plain if not methods[name].select().needs_question]


@pytest.mark.parametrize("name", cacheable())
def test_a_method_that_needs_no_question_caches_the_same_for_all(name):
    method = subjects()[name]
    engine = small_engine(method.weights)
    contexts = []
    for question in (None, CLAIM.question * 3):
        engine.forget()
        contexts.append(engine.cache(CLAIM.chunks, method, question))
    first, second = contexts
    assert torch.equal(first.input_ids, second.input_ids)
    assert torch.equal(first.position_ids, second.position_ids)
    for one, other in zip(first.past_key_values.layers, second.past_key_values.layers, strict=True):
        torch.testing.assert_close(one.keys, other.keys, rtol=0, atol=1e-4)
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-4)
    assert method.cached is not Cached.CHUNKS or first.input_ids.shape[1] > 30


def test_a_reshape_is_refused(tokenizer):
    engine = engine_of(FAMILIES["llama"](), tokenizer)
    with pytest.raises(ValueError, match="reshapes"):
        engine.cache(CLAIM.chunks, "ape")


def test_generate_ignores_what_the_engine_ignores(tokenizer):
    """Qwen2.5 ships a repetition penalty."""
    engine = engine_of(FAMILIES["llama"](), tokenizer)
    config = engine.model.generation_config
    config.repetition_penalty, config.no_repeat_ngram_size, config.num_beams = 1.9, 2, 2
    config.encoder_repetition_penalty, config.exponential_decay_length_penalty = 9.0, (0, 9.0)
    config.use_cache, config.cache_implementation = False, "static"
    assert generated(engine, engine.cache(ASK.chunks), ASK.question) == answered(
        engine, ASK, "naive"
    )


def test_beams_and_several_sequences_continue_one_cache(tokenizer):
    engine = engine_of(FAMILIES["llama"](), tokenizer)
    inputs = engine.cache(ASK.chunks, "full-prefill").inputs(ASK.question)
    for how in ({"num_beams": 3}, {"do_sample": True}):
        how |= {"num_return_sequences": 3, "max_new_tokens": TOKENS}
        outputs = []
        for given in (
            inputs,
            {k: v for k, v in inputs.items() if k != cache_argument(engine.model)},
        ):
            torch.manual_seed(0)
            outputs.append(engine.model.generate(**given, **how))
        assert torch.equal(*outputs)
        assert len(outputs[0]) == 3
        inputs = engine.cache(ASK.chunks, "full-prefill").inputs(ASK.question)


def test_a_pass_over_the_whole_prompt_on_top_of_its_cache_is_refused(tokenizer):
    """Assisted decoding and prompt lookup of transformers 5 do not skip what is cached."""
    engine = engine_of(FAMILIES["llama"](), tokenizer)
    inputs = engine.cache(ASK.chunks, "naive").inputs(ASK.question)
    with pytest.raises(ValueError, match="on top of its cached context"):
        engine.model.generate(**inputs, max_new_tokens=4, prompt_lookup_num_tokens=2)
