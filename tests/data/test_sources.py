"""Every native shape gives the same kind of record, and says what it could not use."""

import json

import pytest
from source_records import CTXS, HUB_HOTPOT, MUSIQUE, OWN, WIKI

from blocktune.data import load_chunks, load_examples
from blocktune.prompt import Chunk


def as_list(path, records):
    path.write_text(json.dumps(records, indent=2), encoding="utf-8")
    return path


def as_lines(path, records):
    text = "\n\n".join(json.dumps(record) for record in records)
    path.write_text(text + "\n", encoding="utf-8")
    return path


@pytest.fixture
def save(tmp_path):
    return lambda records: as_lines(tmp_path / "set.json", records)


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


def test_rows_that_cannot_be_asked_are_counted(save, caplog):
    gone = {key: value for key, value in WIKI.items() if key != "context"}
    empty = {"title": [], "sentences": []}
    others = [WIKI | {"context": none} for none in (None, [], empty)]
    path = save([gone, WIKI, *others])
    assert [example.id for example in load_examples(path)] == ["w1"]
    assert f"{path}: left out 4 rows: no context" in caplog.text


def test_unanswerable_musique_is_counted(save, caplog):
    assert len(load_examples(save([MUSIQUE, MUSIQUE | {"answerable": False}]))) == 1
    assert caplog.text.count("left out 1 rows") == 1


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


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    as_lines(tmp_path / "own.jsonl", [OWN])
    assert load_examples("~/own.jsonl") == load_examples(tmp_path / "own.jsonl")


def test_limit_counts_examples(save):
    path = save([WIKI | {"context": None}, WIKI | {"_id": "a"}, WIKI | {"_id": "b"}])
    assert [example.id for example in load_examples(path, limit=1)] == ["a"]


@pytest.mark.parametrize(
    ("records", "field"),
    [
        ([MUSIQUE, MUSIQUE | {"paragraphs": []}], "paragraphs"),
        ([WIKI, WIKI | {"answer": True}], "answer"),
        ([WIKI, WIKI | {"answer": " "}], "answers"),
        ([WIKI, WIKI | {"context": [["A"]]}], "context[0]"),
        ([WIKI, WIKI | {"context": [["A", "b", "c"]]}], "context[0]"),
        ([WIKI, WIKI | {"context": [{"name": "A"}]}], "context[0]"),
        ([WIKI, WIKI | {"context": {"title": ["A"], "text": []}}], "context"),
        ([WIKI, WIKI | {"supporting_facts": [{}]}], "supporting_facts"),
        ([CTXS, CTXS | {"ctxs": 7}], "ctxs"),
        ([CTXS, CTXS | {"ctxs": [{"title": "T"}]}], "ctxs[0]"),
        ([CTXS, CTXS | {"answers": True}], "answers"),
        ([OWN, OWN | {"anwsers": ["a"]}], "anwsers"),
    ],
)
def test_wrong_record_is_named(tmp_path, records, field):
    with pytest.raises(ValueError, match=r"^set\.json, record 2: ") as error:
        load_examples(as_list(tmp_path / "set.json", records))
    assert f'field "{field}"' in str(error.value)
    with pytest.raises(ValueError, match=r"^set\.json, record 2: must be an object, got int"):
        load_examples(as_list(tmp_path / "set.json", [OWN, 7]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"set\.json is empty"),
        ("[1, 2", r"set\.json, line 1: not JSON"),
        ("# Kirby\n\nKirby is a harbour.", r'line 1: not JSON .*\{"text": "a passage"\}'),
        ('{"question": "q", "chunks": ["c"]}\n{"question', r"set\.json, line 2: not JSON"),
        ('{\n "question": "q",\n "chunks": ["c"\n', r"set\.json, line 4: not JSON"),
        ("[]", "holds no records"),
        ("[" * 100_000, "too deeply"),
        ("[3]", "the first is int"),
    ],
)
def test_file_that_cannot_be_read(tmp_path, text, message):
    path = tmp_path / "set.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        load_examples(path)


@pytest.mark.parametrize("options", ["chunker=delimiter", "as=document"])
def test_passages_of_a_file_are_cut_as_its_source_says(tmp_path, options):
    path = as_lines(tmp_path / "docs.jsonl", [{"text": "one\n\ntwo", "title": "T", "id": "d"}])
    chunks = load_chunks(f"{path}?{options}")
    assert [(c, c.document) for c in chunks] == [(Chunk(t, "T"), "d") for t in ("one", "two")]


def test_chunks_of_a_file(tmp_path):
    lines = [{"text": "one", "title": "T"}, {"text": "two"}, {"text": "one", "title": "T"}]
    path = as_lines(tmp_path / "docs.jsonl", lines)
    assert load_chunks(path) == [Chunk("one", "T"), Chunk("two")]
    with_questions = as_lines(tmp_path / "q.jsonl", [lines[1] | {"questions": [{"question": "?"}]}])
    assert load_chunks(with_questions)[0].text == "two"
    asked = as_lines(tmp_path / "asked.jsonl", [OWN, OWN | {"chunks": ["two", "three"]}])
    assert load_chunks(asked) == [Chunk("one"), Chunk("two"), Chunk("three")]
    shared = as_lines(tmp_path / "shared.jsonl", [{"text": "one", "id": n} for n in "aba"])
    assert [chunk.document for chunk in load_chunks(shared)] == ["a", "b"]
    cohere = as_lines(tmp_path / "cohere.jsonl", [{"id": "d1", "data": lines[0]}])
    assert [(c, c.document) for c in load_chunks(cohere)] == [(Chunk("one", "T"), "d1")]
    wrong = as_lines(tmp_path / "wrong.jsonl", [*lines, {"text": "a", "titel": "b"}])
    with pytest.raises(ValueError, match=r'wrong\.jsonl, line 7: .*mean "title"'):
        load_chunks(wrong)
