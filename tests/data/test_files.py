"""Files as people have them: every format and public shape is read, or told how it would be."""

import bz2
import gzip
import json
import lzma

import pytest
from source_records import OWN

from blocktune.data import RagExample, load_chunks, load_examples
from blocktune.data.sources.options import with_fields
from blocktune.prompt import Chunk

ROWS = [
    {"id": "a", "question": "Who?", "chunks": [{"title": "T", "text": 'Größe, "so"'}, "x\ny"]},
    {"id": "b", "question": "Where?", "chunks": ["one"], "answers": ["here", "there"]},
]
WANTED = [RagExample.from_json(row) for row in ROWS]
SQUAD = {
    "title": "Town",
    "paragraphs": [
        {
            "context": f"Paragraph {p}: its code is {p}.",
            "qas": [
                {
                    "id": f"q{p}",
                    "question": f"What is the code of {p}?",
                    "answers": [{"text": str(p), "answer_start": 0}] * 2,
                }
            ],
        }
        for p in range(14)
    ],
}
LONGBENCH = {
    "input": "Who was born in Kirby?",
    "context": "Passage 1:\nAnna Belt\nAnna was born in Kirby.\n\nPassage 2:\nKirby\n\nA town.\n",
    "answers": ["Anna Belt"],
    "length": 12,
    "dataset": "hotpotqa",
    "_id": "l1",
}
SESSION = {
    "task_id": "t<::>2",
    "contexts": [{"document_id": "d1", "text": "Kirby is a town.", "score": 3.5}],
    "input": [
        {"speaker": "user", "text": "What is Kirby?"},
        {"speaker": "agent", "text": "A town."},
        {"speaker": "user", "text": "Where?"},
    ],
    "targets": [{"speaker": "agent", "text": "Nobody says."}],
    "turn": "2",
}


def json_lines(records):
    return "\n".join(json.dumps(record, ensure_ascii=False) for record in records)


def save(path, *records):
    path.write_text(json_lines(records), encoding="utf-8")
    return path


def write_table(path, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [row | {"chunks": [c["text"] if isinstance(c, dict) else c for c in row["chunks"]]}
            for row in ROWS]  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=pa.Table.from_pylist(rows[1:]).schema)
    if kind == "parquet":
        pq.write_table(table, path)
        return
    new = pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file
    with new(str(path), table.schema) as out:
        out.write_table(table)


@pytest.mark.parametrize(
    "encode",
    [
        lambda text: text.encode(),
        lambda text: b"\xef\xbb\xbf" + text.encode(),
        lambda text: text.replace("\n", "\r\n\r\n").encode(),
        lambda text: gzip.compress(text.encode()),
        lambda text: bz2.compress(text.encode()),
        lambda text: lzma.compress(b"\xef\xbb\xbf" + text.encode()),
    ],
    ids=["lines", "byte-order mark", "CRLF", "gz", "bz2", "xz with mark"],
)
@pytest.mark.parametrize("listed", [False, True])
def test_json_is_told_by_its_content(tmp_path, encode, listed):
    path = tmp_path / "rows.anything"
    path.write_bytes(encode(json.dumps(ROWS, indent=1) if listed else json_lines(ROWS)))
    assert load_examples(path) == WANTED


@pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
def test_tables(tmp_path, kind):
    path = tmp_path / "rows"
    write_table(path, kind)
    examples = load_examples(path)
    assert [example.question for example in examples] == ["Who?", "Where?"]
    assert examples[1].answers == ("here", "there")
    assert examples[0].chunks == (Chunk('Größe, "so"'), Chunk("x\ny"))
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match="rows is not a whole"):
        load_examples(path)


@pytest.mark.parametrize(("name", "comma"), [("a.csv", ","), ("a.tsv", "\t"), ("a.csv.gz", ",")])
def test_csv(tmp_path, name, comma):
    import csv
    import io

    text = io.StringIO()
    rows = csv.writer(text, delimiter=comma)
    rows.writerow(["question", "chunks", "answers", "note"])
    rows.writerow(["Who?", json.dumps(["one", {"text": "two", "title": "T"}]), "Ann", ""])
    rows.writerow(["Where, then?", "['it''s', \"here\"]", '["here"]', "x"])
    rows.writerow(["Why?", "[not a list] " + "x" * 200_000, "", ""])
    data = text.getvalue().encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    first, second, third = load_examples(tmp_path / name)
    assert first == RagExample("Who?", (Chunk("one"), Chunk("two", "T")), ("Ann",))
    assert second.chunks == (Chunk("its"), Chunk("here"))
    assert (second.answers, second.meta) == (("here",), {"note": "x"})
    assert len(third.chunks[0].text) > 200_000
    (tmp_path / "bad.csv").write_text("question,chunks\nWho?,one,two\n")
    with pytest.raises(ValueError, match=r"bad\.csv, line 2: .*2 columns"):
        load_examples(tmp_path / "bad.csv")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"PK\x03\x04....", "zip archive"),
        (b"\xff\xfeq\x00", "UTF-16"),
        (b"GGUF\x03\x00\x00\x00", "GGUF"),
        (b"\x28\xb5\x2f\xfd....", "zstd"),
        (b"\x1f\x8b\x08\x00damaged", "is damaged"),
        (b"\x80\x81 no text", "not UTF-8 text"),
        (b"ARROW1\x00\x00", "not a whole arrow file"),
        (b"PAR1", "not a whole parquet file"),
    ],
)
def test_other_files_say_what_they_look_like(tmp_path, data, word):
    (tmp_path / "rows.jsonl").write_bytes(data)
    with pytest.raises(ValueError, match=word) as error:
        load_examples(tmp_path / "rows.jsonl")
    assert "\n" not in str(error.value)
    assert "rows.jsonl" in str(error.value)


def test_a_folder_is_told(tmp_path):
    with pytest.raises(ValueError, match=f"'hf:{tmp_path}'"):
        load_examples(tmp_path)


@pytest.mark.parametrize("listed", [False, True])
def test_a_lone_surrogate_is_named(tmp_path, listed):
    chunks = '[{"text": "whole \\ud83d\\ude00"}, {"text": "bad \\ud83d half"}]'
    rows = [json.dumps(OWN), f'{{"question": "Where?", "chunks": {chunks}}}']
    (tmp_path / "s.jsonl").write_text(f"[{','.join(rows)}]" if listed else "\n".join(rows))
    place = "record" if listed else "line"
    with pytest.raises(ValueError, match=rf'^s\.jsonl, {place} 2: field "chunks\[1\]\.text"') as e:
        load_examples(tmp_path / "s.jsonl")
    assert "U+D83D, character 5" in str(e.value)
    path = tmp_path / "whole.jsonl"
    path.write_text('{"question": "\\ud83d\\ude00?", "chunks": ["\\uD83D\\uDE00"]}')
    assert load_examples(path)[0].chunks == (Chunk("\U0001f600"),)


def test_unknown_fields_are_kept_and_named_once(tmp_path, caplog):
    rows = [OWN | {"source": f"s{i}", "level": "hard"} for i in range(3)]
    path = save(tmp_path / "rows.jsonl", OWN, *rows)
    examples = load_examples(path)
    assert examples[1].meta == {"source": "s0", "level": "hard"}
    assert [r.getMessage() for r in caplog.records] == [f"{path}: kept in meta: source, level"]


@pytest.mark.parametrize("nested", [lambda a: a, lambda a: {"data": [a, a], "version": "2.0"}])
@pytest.mark.parametrize("indent", [None, 2])
def test_squad(tmp_path, nested, indent):
    path = tmp_path / "squad.json"
    path.write_text(json.dumps(nested(SQUAD), indent=indent))
    examples = load_examples(path)
    assert len(examples) == (14 if "paragraphs" in nested(SQUAD) else 28)
    for example in examples:
        (gold,) = example.supporting
        texts = [chunk.text for chunk in example.chunks]
        assert f"its code is {example.answers[0]}." in texts[gold]
        assert (len(set(texts)), example.chunks[gold].title) == (10, "Town")
        numbers = [int(text.split()[1][:-1]) for text in texts]
        assert numbers == sorted(numbers)
    assert len({example.supporting for example in examples}) > 3
    assert load_examples(path, limit=3) == examples[:3]


def test_squad_without_answers_and_as_on_the_hub(tmp_path, caplog):
    asked = {"id": "i", "question": "?", "answers": [], "is_impossible": True}
    article = {
        "title": "T",
        "paragraphs": [SQUAD["paragraphs"][0], {"context": "c", "qas": [asked]}],
    }
    assert len(load_examples(save(tmp_path / "v2.jsonl", article, SQUAD))) == 15
    assert "v2.jsonl: left out 1 rows" in caplog.text
    flat = {"id": "f", "title": "T", "context": "It is here.", "question": "Where?"}
    flat |= {"answers": {"text": ["here", "here"], "answer_start": [6, 6]}}
    (example,) = load_examples(save(tmp_path / "flat.jsonl", flat))
    assert example == RagExample("Where?", (Chunk("It is here.", "T"),), ("here",), id="f")
    broken = {"title": "T", "paragraphs": [{"context": "c", "qas": [3]}]}
    with pytest.raises(ValueError, match=r"broken\.jsonl, line 1: paragraphs\[0\]"):
        load_examples(save(tmp_path / "broken.jsonl", broken))


def test_longbench(tmp_path):
    (example,) = load_examples(save(tmp_path / "l.jsonl", LONGBENCH))
    assert [c.text.split("\n")[1] for c in example.chunks] == ["Anna Belt", "Kirby"]
    assert (example.question, example.answers) == (LONGBENCH["input"], ("Anna Belt",))
    assert (example.kind, example.id, example.meta["length"]) == ("hotpotqa", "l1", 12)
    whole = LONGBENCH | {"context": "One.\n\nTwo.\n\nThree.", "input": "", "answers": ["Sum."]}
    path = save(tmp_path / "sum.jsonl", whole)
    (example,) = load_examples(path)
    assert len(example.chunks) == 3
    assert "summary" in example.question
    (cut,) = load_examples(f"{path}?chunker=delimiter&max_chunks=2")
    assert len(cut.chunks) == 2


def test_sessions_of_mt_rag(tmp_path, caplog):
    path = save(tmp_path / "m.jsonl", SESSION | {"contexts": []}, SESSION)
    (example,) = load_examples(path)
    assert "left out 1 rows: no passages in contexts" in caplog.text
    assert example.chunks[0].metadata == {"document_id": "d1", "score": 3.5}
    assert example.question.splitlines()[1:] == ["Assistant: A town.", "User: Where?"]
    assert (example.answers, example.id, example.meta) == (
        ("Nobody says.",),
        "t<::>2",
        {"turn": "2"},
    )
    (first,) = load_examples(save(tmp_path / "f.jsonl", SESSION | {"input": SESSION["input"][:1]}))
    assert first.question == "What is Kirby?"


@pytest.mark.parametrize(
    "name", ["ctxs", "passages", "contexts", "retrieved_contexts", "documents"]
)
def test_questions_over_passages_of_every_name(tmp_path, name):
    record = {"question": "Who?", name: ["one", {"page_content": "two"}], "answer": "Ann"}
    (example,) = load_examples(save(tmp_path / "r.jsonl", record))
    assert example == RagExample("Who?", ["one", "two"], "Ann")


@pytest.mark.parametrize(
    "passage",
    [
        {"title": "T", "text": "one"},
        {"id": "doc1", "title": "T", "contents": "one"},
        {"title": "T", "page_content": "one", "metadata": {"source": "a.pdf"}},
    ],
)
def test_corpora_of_every_form(tmp_path, passage):
    path = save(tmp_path / "corpus.jsonl", passage, passage)
    assert load_chunks(path) == [Chunk("one", "T")]
    with pytest.raises(ValueError, match="looks like a corpus") as error:
        load_examples(path)
    said = str(error.value)
    source = said[said.index("'") + 1 : said.rindex("'")]
    path.write_text(json.dumps({k: "a\n\nb" if v == "one" else v for k, v in passage.items()}))
    (example,) = load_examples(source)
    assert (example.chunks, example.target) == ((Chunk("a", "T"),), "b")


KV = {"ordered_kv_records": [["k1", "v1"], ["k2", "v2"]], "key": "k2", "value": "v2"}
NESTED = {"query": "Who?", "docs": [{"text": "one"}], "gold": {"text": "Ann"}, "tag": 3}


@pytest.mark.parametrize(
    ("record", "wanted"),
    [
        (KV, RagExample("k2", [("k1", "v1"), ("k2", "v2")], "v2")),
        (
            {"prompt": "Who?", "evidence": ["one"], "label": "Ann", "tag": 3},
            RagExample("Who?", ["one"], "Ann", meta={"tag": 3}),
        ),
        (
            {"query": "Who?", "evidence": "one " * 200},
            RagExample("Who?", "one " * 200),
        ),
    ],
)
def test_an_unknown_shape_says_the_mapping_that_reads_it(tmp_path, record, wanted):
    path = save(tmp_path / "odd.jsonl", record)
    with pytest.raises(ValueError, match=r"first record has: .*fields=") as error:
        load_examples(path)
    said = str(error.value)
    source = said[said.index("'") + 1 : said.rindex("'")]
    assert load_examples(source) == [wanted]


@pytest.mark.parametrize(
    ("record", "word"),
    [
        ({"timestamp": "2023-11-16 18:17", "input_length": 4}, "None of them holds text"),
        ({"note": "some words here"}, "question:FIELD,chunks:FIELD"),
        ({"question": "Who is it?", "answer": "Ann"}, "blocktune data passages"),
        (
            {"instruction": "Who?", "input": "Ann.", "output": "Ann"},
            "question:instruction,chunks:i",
        ),
        ({"question": {"text": "Who?"}, "document": {"tokens": ["a"]}}, "question:question.text,"),
        ({"Question": "Who?", "Context": "Ann.", "Answer": "Ann"}, "chunks:Context,answers:Answer"),
    ],
)
def test_what_no_mapping_reads_is_told(tmp_path, record, word):
    with pytest.raises(ValueError, match=word):
        load_examples(save(tmp_path / "odd.jsonl", record))


ASKED = {"question": "Who is it?", "context": "It is Ann."}
HOLDERS = {
    "a list beside which nothing is long": {"version": "1", "examples": [ASKED, ASKED]},
    "the viewer's rows": {"rows": [{"row_idx": i, "row": ASKED} for i in range(2)], "partial": 0},
    "columns": {key: [value, value] for key, value in ASKED.items()},
    "names of questions": {"q1": ASKED, "q2": ASKED},
}


@pytest.mark.parametrize("form", HOLDERS)
def test_one_object_that_holds_all_records(tmp_path, form):
    path = tmp_path / "held.json"
    path.write_text(json.dumps(HOLDERS[form]))
    assert [e.question for e in load_examples(path)] == [ASKED["question"]] * 2


HITS = [
    {"document": {"text": "one", "title": "T"}, "score": 1.5},
    {"node": {"text": "one", "title": "T"}},
    {"id": 7, "payload": {"body": "one", "title": "T"}},
    {"_source": {"passage": "one", "title": "T"}, "_score": 2},
    {"passage_text": "one", "title": "T", "is_selected": 1},
]


@pytest.mark.parametrize("hit", HITS)
def test_hits_of_search_engines_are_passages(hit):
    (chunk,) = RagExample("Who?", [hit]).chunks
    assert (chunk.text, chunk.title) == ("one", "T")


def test_numbers_are_answers_and_titles():
    example = RagExample("When?", [{"text": "In that year.", "title": 1966}], [1966, 2.5])
    assert (example.chunks[0].title, example.answers) == ("1966", ("1966", "2.5"))


ZIPPED = gzip.compress(b" ".join(b"%d" % number for number in range(9000)))
BROKEN = {
    "twice.jsonl": (b'{"question": "A?", "question": "B?", "chunks": ["c"]}', "line 1: .*twice"),
    "twice.json": (
        b'[{"question": "A?", "question": "B?", "chunks": ["c"]}]',
        "twice.json: .*twice",
    ),
    "big.jsonl": (
        b'{"question": "A?", "chunks": ["c"], "id": ' + b"9" * 5000 + b"}",
        "line 1: not",
    ),
    "twice.csv": (b"question,question,chunks\nA?,B?,c\n", "gives the column 'question' twice"),
    "mid.gz": (ZIPPED[:1000] + b"junk" * 10 + ZIPPED[1040:], "mid.gz is damaged"),
    "mid.bz2": (b"BZh9" + b"junk" * 90, "mid.bz2 is damaged"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named(tmp_path, name):
    content, words = BROKEN[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=words) as refusal:
        load_examples(tmp_path / name)
    assert name in str(refusal.value)


@pytest.mark.parametrize("mark", [",", ";", "\t"])
def test_what_separates_columns_is_found(tmp_path, mark):
    path = tmp_path / "table.csv"
    path.write_text(f'question{mark}chunks\n"Who, then?"{mark}Ann is here.\n')
    (example,) = load_examples(path)
    assert example.question == "Who, then?"


def test_a_name_may_hold_a_question_mark(tmp_path):
    path = save(tmp_path / "what?.jsonl", *ROWS)
    assert load_examples(path) == WANTED


def test_fields_are_renamed_at_any_depth_and_for_any_shape(tmp_path):
    path = save(tmp_path / "n.jsonl", NESTED)
    (example,) = load_examples(f"{path}?fields=question:query,chunks:docs,answers:gold.text")
    assert example == RagExample("Who?", ["one"], "Ann", meta={"tag": 3})
    assert load_examples(
        with_fields(str(path), "question=query,chunks=docs,answers=gold.text")
    ) == [example]
    news = save(tmp_path / "news.jsonl", {"article": "One.\n\nTwo.", "highlights": "Both."})
    (summary,) = load_examples(f"{news}?as=summary&fields=document:article,summary:highlights")
    assert (len(summary.chunks), summary.answers) == (2, ("Both.",))
    long = save(tmp_path / "long.jsonl", {"q": "Who?", "text": "One.\n\nTwo."})
    (cut,) = load_examples(f"{long}?fields=question:q,chunks:text&chunker=delimiter")
    assert len(cut.chunks) == 2


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ("question:q", 'line 1: .*no field "q".* it has query, docs'),
        ("question", "NEW:OLD"),
        ("question:query,question:docs", "each NEW once"),
        ("question:query,chunks:gold.none", "gold.none"),
    ],
)
def test_a_wrong_mapping_is_one_line(tmp_path, fields, word):
    with pytest.raises(ValueError, match=word):
        load_examples(f"{save(tmp_path / 'n.jsonl', NESTED)}?fields={fields}")


@pytest.mark.parametrize(
    "other", ['{"text": "Anna."}', '"Anna."', '{"question": "Who?"}', '{"ctxs": [], "id": 3}', "7"]
)
@pytest.mark.parametrize(
    "first",
    [
        {"input": "Who?", "context": "Anna.", "answers": ["Anna"]},
        {"question": "Who?", "ctxs": [{"text": "Anna."}], "answers": ["Anna"]},
        {"messages": [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]},
    ],
    ids=lambda record: next(iter(record)),
)
def test_a_record_of_another_shape_is_named(tmp_path, first, other):
    path = tmp_path / "mixed.jsonl"
    path.write_text(f"{json.dumps(first)}\n{other}\n")
    with pytest.raises(ValueError, match=r"^mixed\.jsonl, line 2: [^\n]*$"):
        load_examples(path)
