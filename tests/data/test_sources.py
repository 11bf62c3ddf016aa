"""Every native shape gives the same kind of record, and says what it could not use."""

import gzip
import json

import pytest
from source_records import CTXS, HUB_HOTPOT, MUSIQUE, OWN, WIKI

from blocktune.data import load_chunks, load_examples
from blocktune.data.sources import load_source
from blocktune.prompt import Chunk


def as_list(path, records):
    path.write_text(json.dumps(records, indent=2), encoding="utf-8")
    return path


def as_lines(path, records):
    text = "\n\n".join(json.dumps(record) for record in records)
    path.write_text(text + "\n", encoding="utf-8")
    return path


@pytest.fixture(params=[as_list, as_lines], ids=["list", "lines"])
def save(request, tmp_path):
    """Writes records; both shapes are read whatever the suffix says."""
    return lambda records: request.param(tmp_path / "set.json", records)


def test_musique(save):
    (example,) = load_examples(save([MUSIQUE]))
    assert example.chunks == (Chunk("a text", "A"), Chunk("b text", "B"), Chunk("c text", "C"))
    assert (example.question, example.answers) == ("Who?", ("Ann", "Anna"))
    assert (example.kind, example.id, example.supporting) == ("3-hop", "3hop1__11_22_33", (0, 2))


def test_musique_hops_from_the_decomposition():
    from blocktune.data.sources.schemas import parse_musique

    assert parse_musique(MUSIQUE | {"id": "x"}).kind == "3-hop"


def test_two_wiki(save):
    (example,) = load_examples(save([WIKI]))
    assert example.chunks == (Chunk("One. Two.", "A"), Chunk("Three.", "B"), Chunk("Four.", "A"))
    assert (example.kind, example.id, example.answers) == ("bridge_comparison", "w1", ("yes",))
    assert example.supporting == (0, 2)


def test_hotpot_as_on_the_hub(save):
    (example,) = load_examples(save([HUB_HOTPOT]))
    assert example.chunks == (Chunk("One. Two.", "A"), Chunk("Three.", "B"))
    assert (example.kind, example.id, example.supporting) == ("comparison", "h1", (1,))


def test_cacheblend(save):
    (example,) = load_examples(save([CTXS]))
    assert example.chunks == (Chunk("lower case"), Chunk("titled", "T"))
    assert (example.answers, example.kind, example.supporting) == (("ann", "anna"), "", ())


def test_gzip(tmp_path):
    path = tmp_path / "set.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(CTXS).encode()))
    assert load_examples(path)[0].question == "who?"


def test_rows_that_cannot_be_asked_are_counted(save, caplog):
    gone = {key: value for key, value in WIKI.items() if key != "context"}
    path = save([gone, WIKI | {"context": None}, WIKI, WIKI | {"context": []}])
    loaded = load_source(path)
    assert [example.id for example in loaded.examples] == ["w1"]
    assert loaded.left_out == {"no context": 3}
    assert load_examples(path) == loaded.examples
    assert f"{path}: left out 3 rows: no context" in caplog.text


def test_unanswerable_musique_is_counted(save):
    loaded = load_source(save([MUSIQUE, MUSIQUE | {"answerable": False}]))
    assert (len(loaded.examples), len(loaded.left_out)) == (1, 1)


def test_blank_passage_moves_supporting(save):
    blank = WIKI | {"context": [["B", [" "]], ["A", ["One."]]]}
    (example,) = load_examples(save([blank]))
    assert example.chunks == (Chunk("One.", "A"),)
    assert (example.supporting, example.meta) == ((0,), {"blank_passages": 1})


@pytest.mark.parametrize(
    "context",
    [
        [["A", "One."], ["B", "Two."]],
        [{"title": "A", "text": "One."}, {"title": "B", "text": "Two."}],
        [{"title": "A", "sentences": ["One."]}, {"title": "B", "content": [" Two. "]}],
        {"title": ["A", "B"], "sentences": ["One.", ["Two."]]},
    ],
)
def test_passages_of_a_context_in_every_shape(save, context):
    facts = [{"title": "B", "sent_id": 0}]
    (example,) = load_examples(save([WIKI | {"context": context, "supporting_facts": facts}]))
    assert example.chunks == (Chunk("One.", "A"), Chunk("Two.", "B"))
    assert example.supporting == (1,)


def test_a_context_of_plain_strings(save):
    (example,) = load_examples(save([WIKI | {"context": ["One.", "Two."]}]))
    assert example.chunks == (Chunk("One."), Chunk("Two."))


def test_blank_aliases_are_no_answers(save):
    (example,) = load_examples(save([CTXS | {"answers": ["ann", " ", "", "ann"]}]))
    assert example.answers == ("ann",)


def test_limit_counts_examples(save):
    path = save([WIKI | {"context": None}, WIKI | {"_id": "a"}, WIKI | {"_id": "b"}])
    assert [example.id for example in load_examples(path, limit=1)] == ["a"]


def test_line_seven(tmp_path):
    records = [OWN] * 6 + [{"question": "q", "chunks": []}]
    path = tmp_path / "docs.jsonl"
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    with pytest.raises(
        ValueError, match=r'^docs\.jsonl, line 7: field "chunks" must be a non-empty'
    ):
        load_examples(path)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([MUSIQUE, MUSIQUE | {"paragraphs": []}], 'field "paragraphs" must be a non-empty list of'),
        ([WIKI, WIKI | {"answer": 3}], 'field "answers" must be a list of non-blank strings'),
        ([WIKI, WIKI | {"context": [["A"]]}], 'field "context[0]" must be [title, [sentences]], {'),
        ([WIKI, WIKI | {"context": [["A", "b", "c"]]}], 'field "context[0]" must be [title, [sen'),
        ([WIKI, WIKI | {"context": [{"name": "A"}]}], 'field "context[0]" must be [title, [sente'),
        ([WIKI, WIKI | {"context": {"title": ["A"], "text": []}}], 'field "context" must be an ob'),
        ([WIKI, WIKI | {"supporting_facts": [{}]}], 'field "supporting_facts" must be a list of'),
        ([CTXS, CTXS | {"ctxs": "text"}], 'field "ctxs" must be a non-empty list of {"title", "te'),
        ([CTXS, CTXS | {"ctxs": [{"title": "T"}]}], "a chunk's text must be a non-blank string"),
        ([CTXS, CTXS | {"answers": "ann"}], 'field "answers" must be a list of strings, got "ann"'),
        ([OWN, 7], "must be an object, got int"),
        ([OWN, OWN | {"chunk": 1}], 'unknown field "chunk"; known: question, chunks'),
    ],
)
def test_wrong_record_is_named(tmp_path, records, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the whole message is compared
        load_examples(as_list(tmp_path / "set.json", records))
    assert str(error.value).startswith(f"set.json, record 2: {message}")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "set.json is empty"),
        ("[1, 2", "set.json, line 1: not JSON"),
        ('{"question": "q", "chunks": ["c"]}\n{"question', "set.json, line 2: not JSON"),
        ('[{"query": "q", "docs": []}]', "the first record has: query, docs"),
        ("[]", "the first record has: NoneType"),
    ],
)
def test_file_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "set.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_examples(path)


def test_unknown_shape_says_what_it_looked_for(tmp_path):
    path = as_list(tmp_path / "set.json", [{"title": "T", "text": "t"}])
    looked_for = "blocktune: question, chunks; MuSiQue: question, paragraphs; HotpotQA or 2Wiki"
    with pytest.raises(ValueError, match=looked_for):
        load_examples(path)


def test_binary_file_is_refused(tmp_path):
    (tmp_path / "set.json").write_bytes(b"\xff\xfe\x00\x01")
    with pytest.raises(ValueError, match="is not UTF-8 text"):
        load_examples(tmp_path / "set.json")


def test_chunks_of_a_file(tmp_path):
    lines = [{"text": "one", "title": "T"}, {"text": "two"}, {"text": "one", "title": "T"}]
    path = as_lines(tmp_path / "docs.jsonl", lines)
    assert load_chunks(path) == [Chunk("one", "T"), Chunk("two")]
    asked = as_lines(tmp_path / "asked.jsonl", [OWN, OWN | {"chunks": ["two", "three"]}])
    assert load_chunks(asked) == [Chunk("one"), Chunk("two"), Chunk("three")]
    wrong = as_lines(tmp_path / "wrong.jsonl", [*lines, {"text": "a", "titel": "b"}])
    with pytest.raises(ValueError, match=r'wrong\.jsonl, line 7: field "text" must be a string or'):
        load_chunks(wrong)
