"""The record: strict in, lossless out, and one clear line for what is wrong."""

import json

import numpy as np
import pandas
import pytest
from datasets import Dataset

from blocktune.data import RagExample, load_examples, write_jsonl
from blocktune.data.example import read_chunk
from blocktune.data.sources.catalog import data_sets_of
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
    nan = float("nan")  # as pandas writes null
    plain = RagExample.from_json(GOOD)
    assert RagExample.from_json(GOOD | dict.fromkeys([*nulls, "other"], nan)) == plain
    chunk = read_chunk({"text": "one", "title": nan, "score": nan}, "x")
    assert (chunk.title, dict(chunk.metadata)) == (None, {})
    with pytest.raises(ValueError, match='"answers" must be text, a list of texts'):
        RagExample.from_json(GOOD | {"answers": [nan]})
    with pytest.raises(ValueError, match='field "question" is missing'):
        RagExample.from_json(GOOD | {"question": None})


def test_what_a_table_fills_in_is_left_out(tmp_path):
    rows = [GOOD | {"id": "a", "meta": {"data_sets": {"x/a": "mit"}, "k": 1}}]
    rows += [GOOD | {"id": "b", "meta": {"data_sets": {"x/b": "apache-2.0"}}}]
    rows[0]["chunks"] = [{"text": "T", "metadata": {"url": "u"}}]
    rows[1]["chunks"] = [{"text": "T", "metadata": {"place": {"page": 1}}}]
    Dataset.from_list(rows).to_parquet(path := tmp_path / "rows.parquet")
    first, second = load_examples(path)
    assert first.chunks[0].metadata == {"url": "u"}
    assert second.chunks[0].metadata == {"place": {"page": 1}}
    assert second.meta.keys() == {"data_sets"}
    assert data_sets_of([first, second]) == {"x/a": "mit", "x/b": "apache-2.0"}


def test_target():
    assert FULL.target == "It. Answer: here"
    assert RagExample("q", (Chunk("c"),), ("a", "b")).target == "a"
    with pytest.raises(ValueError, match="example 'q' has no answer to train on"):
        _ = RagExample("q", (Chunk("c"),)).target


@pytest.mark.parametrize(
    ("change", "field", "word"),
    [
        ({"chunks": []}, "chunks", "a non-empty list"),
        ({"chunks": 7}, "chunks", "7"),
        ({"chunks": [1]}, "chunks[0]", "got 1"),
        ({"chunks": ["a", {"txt": "b"}]}, "chunks[1]", '{"txt": "b"}'),
        ({"chunks": ["a", {"text": "b", "titel": "T"}]}, "chunks[1]", 'mean "title"'),
        ({"chunks": ["a", " "]}, "chunks[1]", "non-blank"),
        ({"chunks": ["a", "b \ud83d"]}, "chunks[1]", "lone surrogate"),
        ({"chunks": {"title": ["A"], "text": []}}, "chunks", "one length"),
        ({"question": " "}, "question", 'got " "'),
        ({"question": "\udc00 half"}, "question", "lone surrogate"),
        ({"answers": ["a", True]}, "answers", '["a", true]'),
        ({"answers": {"start": 1}}, "answers", '{"start": 1}'),
        ({"response": 1}, "response", "got 1"),
        ({"conversation": [["user", "a"], ["assistant", "b"]]}, "conversation", "[role, text]"),
        ({"conversation": [["assistant", "b"], ["user", "a"]]}, "conversation", "[role, text]"),
        ({"conversation": [["user", " "]]}, "conversation", "[role, text]"),
        ({"kind": 2}, "kind", "got 2"),
        ({"id": [7]}, "id", "got [7]"),
        ({"supporting": [1]}, "supporting", "from 0 to 0"),
        ({"supporting": [True]}, "supporting", "from 0 to 0"),
        ({"meta": []}, "meta", "got []"),
        ({"anwsers": ["a"]}, "anwsers", 'mean "answers"'),
        ({"Followups": []}, "Followups", 'mean "followups"'),
        ({"source": "x", "meta": {"source": "y"}}, "source", "twice"),
    ],
)
def test_wrong_field_is_named(change, field, word):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - parts of the message are compared
        RagExample.from_json(GOOD | change, "docs.jsonl, line 7")
    text = str(error.value)
    assert text.startswith("docs.jsonl, line 7: ")
    assert f'field "{field}"' in text
    assert word in text
    assert "\n" not in text
    assert text.encode()  # can be printed


@pytest.mark.parametrize("missing", ["question", "chunks"])
def test_missing_field_is_named(missing):
    record = {key: value for key, value in GOOD.items() if key != missing}
    with pytest.raises(ValueError, match=f'^field "{missing}" is missing; known: question, chunks'):
        RagExample.from_json(record)


def test_long_values_are_cut_short():
    with pytest.raises(ValueError, match=r'got \["x{55}\.\.\.$'):
        RagExample.from_json(GOOD | {"chunks": [["x" * 10_000]]})


class Document:
    """What LangChain's class has."""

    def __init__(self, page_content, metadata):
        self.page_content, self.metadata, self.id = page_content, metadata, None


PASSAGES = {
    "Chunk": Chunk("one", "T"),
    "tuple": ("T", "one"),
    "object": {"title": "T", "text": "one"},
    "sentences": {"title": "T", "sentences": ["one"]},
    "LangChain, JSON": {"title": "T", "page_content": "one", "metadata": {"source": "a.pdf"}},
    "Cohere": {"id": "7", "data": {"title": "T", "snippet": "one"}},
    "Cohere, text": {"title": "T", "data": "one"},
    "Pyserini": {"title": "T", "id": "7", "contents": "one", "score": 1.5},
}


@pytest.mark.parametrize("passage", PASSAGES.values(), ids=PASSAGES)
def test_passages_in_every_form(passage):
    wanted = RagExample("q", (Chunk("one", "T"), Chunk("two")))
    for several in ([passage, "two"], (passage, "two"), iter([passage, "two"])):
        assert RagExample("q", several) == wanted


class Found:
    """A passage as an object: LangChain, LlamaIndex and Haystack differ by their names."""

    def __init__(self, **fields):
        vars(self).update(fields)


@pytest.mark.parametrize(
    "passage",
    [
        Found(text="T", metadata={"k": 1}, score=0.5, node=object()),
        Found(content="T", meta={"k": 1}, score=0.5, embedding=None),
        (Found(page_content="T", metadata={"k": 1}), np.float32(0.5)),
        ("T", 0.5),
        {"entity": {"text": "T"}, "score": 0.5},
        {"properties": {"text": "T"}, "score": 0.5},
        {"page_snippet": "T", "score": 0.5},
    ],
)
def test_what_retrievers_return_keeps_its_score(passage):
    (chunk,) = RagExample("q", [passage]).chunks
    assert (chunk, chunk.metadata["score"]) == (Chunk("T"), 0.5)


@pytest.mark.parametrize(
    "chunks",
    [
        {"one", "two"},
        ["page_content='T' metadata={}"],
        ["[Document(metadata={}, page_content='T')]"],
    ],
)
def test_a_set_and_printed_documents_are_refused(chunks):
    with pytest.raises(ValueError, match=r'field "chunks(\[0\])?" must be'):
        RagExample("q", chunks)
    assert RagExample("q", [(None, "T")]).chunks == (Chunk("T"),)


def test_one_passage_columns_and_documents():
    assert RagExample("q", "one").chunks == (Chunk("one"),)
    columns = {"title": ["T", None], "text": ["one", "two"], "score": [2.0, 1.0]}
    example = RagExample("q", columns)
    assert example.chunks == (Chunk("one", "T"), Chunk("two"))
    assert [chunk.metadata for chunk in example.chunks] == [{"score": 2.0}, {"score": 1.0}]
    assert RagExample("q", pandas.DataFrame(columns)).chunks == example.chunks
    document = Document("one", {"source": "a.pdf", "page": 3})
    (chunk,) = RagExample("q", [document]).chunks
    assert (chunk, chunk.metadata) == (Chunk("one"), {"source": "a.pdf", "page": 3})
    dumped = {"lc": 1, "kwargs": {"page_content": "one", "metadata": {"page": 3}}}
    assert RagExample("q", [dumped]).chunks[0].metadata == {"page": 3}


def test_what_else_is_known_is_kept_and_survives_json():
    passage = {"text": "one", "id": 4, "score": 0.5, "metadata": {"source": "a.pdf"}}
    example = RagExample.from_json(GOOD | {"chunks": [passage], "source": "web", "answer": "a"})
    known = {"id": 4, "score": 0.5, "source": "a.pdf"}
    assert example.chunks[0].metadata == known
    assert (example.meta, example.answers) == ({"source": "web"}, ("a",))
    again = RagExample.from_json(json.loads(json.dumps(example.to_json())))
    assert again == example
    assert again.chunks[0].metadata == known


@pytest.mark.parametrize(
    ("answers", "read"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ({"text": ["a", "a", "b"], "answer_start": [1, 2, 3]}, ("a", "b")),
        ({"value": "a", "aliases": ["b", " "]}, ("a", "b")),
    ],
)
def test_answers_in_every_form(answers, read):
    assert RagExample.from_json(GOOD | {"answers": answers}).answers == read
    assert RagExample.from_json(GOOD | {"answer": answers, "id": 7}).answers == read


def test_lists_in_code_become_tuples():
    assert RagExample("q", ["c"], "a", supporting=[0], followups=[["q2", "r"]]) == RagExample(
        "q", (Chunk("c"),), ("a",), supporting=(0,), followups=(("q2", "r"),)
    )


def test_rows_of_numpy_arrays_and_numbers():
    """As `pandas.read_parquet` returns them."""
    wanted = RagExample("q", ["one"], ["a", "2"], supporting=[0], id="7")
    fields = {"answers": np.array(["a", 2], dtype=object), "supporting": np.array([0])}
    for number in (7, 7.0, np.int64(7), np.float64(7)):
        assert RagExample("q", np.array(["one"]), **fields, id=number) == wanted
    year = {"question": "q", "chunks": [{"title": 1984.0, "text": "one"}], "answer": 1990.0}
    assert RagExample.from_json(year) == RagExample("q", [("1984", "one")], "1990")
    row = {"question": "q", "chunks": np.array([{"text": "one"}]), **fields, "id": 7.0}
    assert RagExample.from_json(row) == wanted
    assert RagExample.from_json(row | {"id": float("nan")}).id == ""


def test_numbers_of_numpy_are_written_as_numbers(tmp_path):
    hit = {"text": "one", "score": np.float32(0.5), "rank": np.int64(3)}
    write_jsonl(tmp_path / "out.jsonl", [RagExample("q", [hit], meta={"scores": np.ones(2)})])
    (read,) = load_examples(tmp_path / "out.jsonl")
    assert read.chunks[0].metadata == {"score": 0.5, "rank": 3}
    assert read.meta == {"scores": [1.0, 1.0]}


@pytest.mark.parametrize(
    ("change", "read"),
    [
        ({"answers": {"text": [], "answer_start": []}}, ()),
        ({"answers": "a", "answer_aliases": "bcd"}, ("a", "bcd")),
        ({"answers": {"value": "a", "aliases": "bcd"}}, ("a", "bcd")),
        ({"answers": {"value": "a", "aliases": None}, "answer_aliases": None}, ("a",)),
    ],
)
def test_no_answer_and_a_single_alias(change, read):
    """A text is one alias, not one for each of its letters."""
    kept = {"question": "q", "chunks": ["c"]} | change
    assert RagExample.from_json(kept).answers == read
