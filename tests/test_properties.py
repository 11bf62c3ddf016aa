"""For any texts, chunks, templates and tokenizers: pieces join, answers are exact, errors one line.

``tests/fuzz.py`` tries whole command lines and files the same way.
"""

import functools

import pytest
import torch
from chat_families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_llama import tiny_llama
from tiny_tokenizer import build_tokenizer, trl_template

from blocktune import Engine, RagExample
from blocktune.attention import DensePlan
from blocktune.cache.store.fingerprint import key_after
from blocktune.methods import build
from blocktune.prompt import Chunk, PromptFormat, make_pieces, stack
from blocktune.prompt.pieces import chunk_ids
from blocktune.testing import byte_tokenizer

CONTEXT = 512
TEMPLATES = (*FAMILIES, "plain", "bytes")
METHODS = ("full-prefill", "naive", "epic", "cacheblend")

WORDS = st.sampled_from(
    ["Anna", "Belt was born", " in\n", "<|end|>", "</s>", "<s>", "{title}", "{{ x }}", "\r\n", "\0"]
)
TEXT = st.one_of(
    st.text(max_size=12),
    st.lists(WORDS, max_size=5).map(" ".join),
    st.text(st.characters(categories=("Cs", "Cc", "Mn", "Lo", "Zs", "So")), max_size=8),
)
CHUNK = st.one_of(
    TEXT,
    st.fixed_dictionaries({"text": TEXT}, optional={"title": st.none() | TEXT, "id": TEXT}),
    st.tuples(TEXT, TEXT).map(list),
)
RECORD = st.fixed_dictionaries({"question": TEXT, "chunks": st.lists(CHUNK, max_size=4)})

bounded = settings(
    max_examples=40, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)


@functools.cache
def tokenizer_of(name: str):
    if name == "bytes":
        return byte_tokenizer()
    return build_tokenizer(None if name == "plain" else trl_template(name), adds_bos=True)


@functools.cache
def engine_of(name: str) -> Engine:
    tokenizer = tokenizer_of(name)
    model = tiny_llama(tokenizer, CONTEXT, initializer_range=0.2)
    return Engine(model.eval(), tokenizer)


def one_line(error: ValueError, start: str = "") -> None:
    assert "\n" not in str(error)
    assert str(error).startswith(start)


def example_of(record) -> RagExample | None:
    """The example, or None where the record is refused in one line."""
    try:
        return RagExample.from_json(record)
    except ValueError as error:
        one_line(error, "field ")
        return None


@pytest.mark.parametrize("name", TEMPLATES)
@bounded
@given(record=RECORD, title=TEXT)
def test_pieces_join_to_what_is_stored(name, record, title):
    if (example := example_of(record)) is None:
        return
    tokenizer, fmt = tokenizer_of(name), PromptFormat()
    try:
        pieces = make_pieces(tokenizer, fmt, example.chunks, example.question)
    except ValueError as error:
        one_line(error)
        return
    for chunk, ids in zip(example.chunks, pieces.chunks, strict=True):
        assert (ids,) == chunk_ids(tokenizer, fmt, [chunk])
        assert tokenizer.decode(ids) == fmt.render_chunk(chunk)
        # Alone or among others, in any place: the same tokens.
        others = (Chunk("Other."), chunk)
        assert make_pieces(tokenizer, fmt, others, "Why?").chunks[1] == ids
    special = set(tokenizer.all_special_ids)
    assert not special & {token for ids in pieces.chunks for token in ids}
    question = tokenizer.decode(pieces.query)
    assert example.question.strip() in question


@pytest.mark.parametrize("name", ["plain", "llama3", "gemma", "bytes"])
@pytest.mark.parametrize("method", METHODS)
@settings(bounded, max_examples=8)
@given(record=RECORD)
def test_answers_equal_a_dense_forward(name, method, record):
    if (example := example_of(record)) is None:
        return
    engine, plain = engine_of(name), build("naive")
    pieces = engine.prompts.pieces(example, plain)
    try:
        prompt = engine.prompts.prompt(pieces, engine.prompts.spec(build(method)))
    except ValueError as error:
        one_line(error)
        return
    logits = engine.next_logits([example], method)
    if method in ("epic", "cacheblend"):  # everything fresh is a full prefill
        logits = engine.next_logits([example], _everything(method))
        prompt = engine.prompts.prompt(pieces, engine.prompts.spec(build("full-prefill")))
    batch = stack([prompt], pad_id=0)
    with torch.no_grad():
        dense = engine.model(
            batch.input_ids,
            position_ids=batch.layout.position,
            plan=DensePlan(batch.layout),
            use_cache=False,
        ).logits[:, -1]
    torch.testing.assert_close(
        logits, dense, rtol=0, atol=1e-4 * max(1.0, float(dense.abs().max()))
    )
    if method == "naive":
        for ids in pieces.chunks:
            key = key_after(engine.fingerprint, ids, ())
            stored = engine.store.get(key, torch.tensor(ids), engine.fingerprint)
            assert stored.token_ids.tolist() == list(ids)


def _everything(method: str):
    return build("epic", k=CONTEXT) if method == "epic" else build("cacheblend", ratio=1.0)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
FIELDS = (*RagExample.__dataclass_fields__, "answer", "context", "documents")


@settings(bounded, max_examples=400)
@given(record=st.dictionaries(st.sampled_from(FIELDS), ANYTHING) | ANYTHING)
def test_any_record_is_read_or_refused_in_one_line(record):
    try:
        example = RagExample.from_json(record, "q.jsonl, line 1")
    except ValueError as error:
        one_line(error, "q.jsonl, line 1: ")
        return
    assert RagExample.from_json(example.to_json()) == example


@settings(bounded, max_examples=200)
@given(values=st.dictionaries(st.sampled_from((*PromptFormat.__dataclass_fields__, "x")), ANYTHING))
def test_any_wording_is_read_or_refused_in_one_line(values):
    try:
        fmt = PromptFormat.from_dict(values)
    except ValueError as error:
        one_line(error)
        return
    assert PromptFormat.from_dict(fmt.to_dict()) == fmt
    make_pieces(tokenizer_of("bytes"), fmt, [Chunk("Anna.")], "Who?")
