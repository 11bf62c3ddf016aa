"""The record: strict in, lossless out, and one clear line for what is wrong."""

import json

import pytest

from blocktune.data import RagExample, load_examples, write_jsonl
from blocktune.prompt import Chunk

FULL = RagExample(
    question="Where is it?",
    chunks=(Chunk("It is here.", "It"), Chunk("Größe 東京")),
    answers=("here", "Here"),
    response="It. Answer: here",
    kind="2-hop",
    id="7",
    supporting=(0,),
    meta={"bridges": ["It"]},
)
CHAT = (("system", "Be brief."), ("user", "Who?"), ("assistant", "Anna."), ("user", "Where?"))
GOOD = {"question": "q", "chunks": ["text"]}


def test_json_round_trip():
    assert RagExample.from_json(json.loads(json.dumps(FULL.to_json()))) == FULL


def test_file_round_trip(tmp_path):
    least = RagExample("q", (Chunk("text"),))
    assert write_jsonl(tmp_path / "a.jsonl", [FULL, least]) == 2
    assert load_examples(tmp_path / "a.jsonl") == [FULL, least]
    assert (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines()[1] == json.dumps(
        {"question": "q", "chunks": [{"text": "text"}]}
    )


def test_a_conversation_round_trip():
    example = RagExample("Where?", (Chunk("Who? Anna."),), conversation=CHAT)
    assert RagExample.from_json(json.loads(json.dumps(example.to_json()))) == example


def test_null_is_a_field_left_out():
    """Tables give every row all columns, so a set on the Hub holds nulls where rows differ."""
    nulls = dict.fromkeys(
        ("answers", "response", "kind", "id", "supporting", "meta", "followups", "conversation")
    )
    assert RagExample.from_json(GOOD | nulls) == RagExample.from_json(GOOD)
    with pytest.raises(ValueError, match='field "question" is missing'):
        RagExample.from_json(GOOD | {"question": None})


def test_chunks_as_plain_strings():
    record = {"question": "q", "chunks": ["one", {"text": "two", "title": "T"}, {"text": "three"}]}
    chunks = (Chunk("one"), Chunk("two", "T"), Chunk("three"))
    assert RagExample.from_json(record).chunks == chunks


def test_target():
    assert FULL.target == "It. Answer: here"
    assert RagExample("q", (Chunk("c"),), ("a", "b")).target == "a"
    with pytest.raises(ValueError, match="example 'q' has no answer to train on"):
        _ = RagExample("q", (Chunk("c"),)).target


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"chunks": []},
            'field "chunks" must be a non-empty list of strings or {"text", "title"?}, got []; '
            "a question needs at least one retrieved chunk",
        ),
        ({"chunks": "text"}, 'field "chunks" must be a non-empty list'),
        ({"chunks": [1]}, 'field "chunks[0]" must be a string or {"text", "title"?}, got 1'),
        (
            {"chunks": ["a", {"txt": "b"}]},
            'field "chunks[1]" must be a string or {"text", "title"?}, got {"txt": "b"}',
        ),
        ({"chunks": ["a", {"text": "b", "id": 1}]}, 'field "chunks[1]" must be a string or'),
        ({"chunks": ["a", " "]}, 'field "chunks[1]": a chunk\'s text must be a non-blank string'),
        ({"question": " "}, 'field "question" must be a non-blank string, got " "'),
        ({"answers": "a"}, 'field "answers" must be a list of non-blank strings, got "a"'),
        (
            {"answers": ["a", 1]},
            'field "answers" must be a list of non-blank strings, got ["a", 1]',
        ),
        ({"response": 1}, 'field "response" must be a string or null, got 1'),
        ({"conversation": [["user", "a"], ["assistant", "b"]]}, 'field "conversation" must be [r'),
        ({"conversation": [["assistant", "b"], ["user", "a"]]}, 'field "conversation" must be [r'),
        ({"conversation": [["user", " "]]}, 'field "conversation" must be [role, text] of system'),
        ({"kind": 2}, 'field "kind" must be a string, got 2'),
        ({"id": 7}, 'field "id" must be a string, got 7'),
        ({"supporting": [1]}, 'field "supporting" must be a list of chunk indices from 0 to 0'),
        ({"supporting": [True]}, 'field "supporting" must be a list of chunk indices'),
        ({"meta": []}, 'field "meta" must be an object, got []'),
        ({"answer": "a"}, 'unknown field "answer"; known: question, chunks, answers, response'),
    ],
)
def test_wrong_field_is_named(change, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        RagExample.from_json(GOOD | change, "docs.jsonl, line 7")
    text = str(error.value)
    assert text.startswith(f"docs.jsonl, line 7: {message}")
    assert "\n" not in text


@pytest.mark.parametrize("missing", ["question", "chunks"])
def test_missing_field_is_named(missing):
    record = {key: value for key, value in GOOD.items() if key != missing}
    with pytest.raises(ValueError, match=f'^field "{missing}" is missing; known: question, chunks'):
        RagExample.from_json(record)


def test_long_values_are_cut_short():
    with pytest.raises(ValueError, match=r'got "x{56}\.\.\.$'):
        RagExample.from_json(GOOD | {"answers": "x" * 10_000})


def test_examples_built_in_code_are_checked():
    with pytest.raises(ValueError, match='field "chunks" must be a non-empty tuple of Chunk'):
        RagExample("q", ())
    with pytest.raises(ValueError, match='field "chunks" must be a non-empty tuple of Chunk'):
        RagExample("q", ("text",))
