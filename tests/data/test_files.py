"""Files as people have them: every format is read, or named."""

import bz2
import gzip
import json
import lzma

import numpy as np
import pandas
import pytest
from source_records import OWN, json_lines, save

from blocktune.data import RagExample, load_examples
from blocktune.prompt import Chunk

ROWS = [
    {"id": "a", "question": "Who?", "chunks": [{"title": "T", "text": 'Größe, "so"'}, "x\ny"]},
    {"id": "b", "question": "Where?", "chunks": ["one"], "answers": ["here", "there"]},
]
WANTED = [RagExample.from_json(row) for row in ROWS]


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
    rows.writerow(["Where, then?", str(["it's", "here"]), '["here"]', "x"])
    rows.writerow(["Why?", "[not a list] " + "x" * 200_000, "", ""])
    data = text.getvalue().encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    first, second, third = load_examples(tmp_path / name)
    assert first == RagExample("Who?", (Chunk("one"), Chunk("two", "T")), ("Ann",))
    assert second.chunks == (Chunk("it's"), Chunk("here"))
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
        (b"\x28\xb5\x2f\xfd....", "zstd"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
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
    place = r'\.jsonl: field "\[1\]\.' if listed else r'\.jsonl, line 2: field "'
    with pytest.raises(ValueError, match=rf'^s{place}chunks\[1\]\.text"') as e:
        load_examples(tmp_path / "s.jsonl")
    assert "U+D83D, character 5" in str(e.value)
    path = tmp_path / "whole.jsonl"
    path.write_text('{"question": "\\ud83d\\ude00?", "chunks": ["\\uD83D\\uDE00"]}')
    assert load_examples(path)[0].chunks == (Chunk("\U0001f600"),)


ASKED = {"question": "Who is it?", "context": "It is Ann."}
HOLDERS = {
    "a list beside which nothing is long": {"version": "1", "examples": [ASKED, ASKED]},
    "the viewer's rows": {
        "features": [{"feature_idx": 0, "name": "question"}],
        "rows": [{"row_idx": i, "row": ASKED, "truncated_cells": []} for i in range(2)],
        "partial": False,
    },
    "columns": {key: [value, value] for key, value in ASKED.items()},
    "names of questions": {"q1": ASKED, "q2": ASKED},
    "pandas' columns": json.loads(pandas.DataFrame([ASKED] * 2).to_json()),
    "pandas' table": json.loads(pandas.DataFrame([ASKED] * 2).to_json(orient="table")),
}


@pytest.mark.parametrize("form", HOLDERS)
def test_one_object_that_holds_all_records(tmp_path, form):
    path = tmp_path / "held.json"
    path.write_text(json.dumps(HOLDERS[form]))
    assert [e.question for e in load_examples(path)] == [ASKED["question"]] * 2


ZIPPED = gzip.compress(b" ".join(b"%d" % number for number in range(9000)))
BROKEN = {
    "twice.jsonl": (
        b'{"question": "A?", "question": "B?", "chunks": ["c"]}',
        "line 1: .*key 'question' is given 2",
    ),
    "twice.json": (
        b'[{"question": "A?", "question": "B?", "chunks": ["c"]}]',
        "twice.json: .*key 'question' is given 2",
    ),
    "big.jsonl": (
        b'{"question": "A?", "chunks": ["c"], "id": ' + b"9" * 5000 + b"}",
        "line 1: not",
    ),
    "twice.csv": (b"question,question,chunks\nA?,B?,c\n", "column 'question' is given 2"),
    "half.csv": (
        b'question,chunks,note\nA?,c,"{""k"": ""\\ud83d""}"\n',
        r'line 2: field "note\.k" holds a lone surrogate',
    ),
    "name.jsonl": (
        b'{"question": "A?", "chunks": ["c"], "\\ud83d": 1}',
        "line 1: name of a field holds a lone surrogate",
    ),
    "open.tsv": (b'question\tchunks\n"A?\tc\nB?\td\nWho "is"?\te\n', "line 4: not CSV .*quotes"),
    "texts.jsonl": (b'"A?"\n"B?"\n', "the first is str"),
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


@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
def test_what_separates_columns_is_found(tmp_path, mark):
    path = tmp_path / "table.csv"
    path.write_text(f'question{mark}chunks\n"Who, then?"{mark}Ann is here.\n')
    (example,) = load_examples(path)
    assert example.question == "Who, then?"


def test_a_name_may_hold_a_question_mark(tmp_path):
    path = save(tmp_path / "what?.jsonl", *ROWS)
    assert load_examples(path) == WANTED


@pytest.mark.parametrize(
    "chunks",
    [["Ann is here.", "Bob is 'not'."], [{"text": "Ann"}, {"text": "Bob"}], ["x" * 60] * 3],
    ids=["texts", "objects", "lines"],
)
def test_a_list_that_pandas_wrote_is_read_and_a_printed_array_is_refused(tmp_path, chunks):
    path = tmp_path / "table.csv"
    table = pandas.DataFrame({"question": ["Who?"], "chunks": [chunks]})
    table.to_csv(path, index=False)
    assert load_examples(path) == [RagExample("Who?", chunks)]
    table["chunks"] = [np.array(chunks, dtype=object)]
    table.to_csv(path, index=False)
    with pytest.raises(
        ValueError, match=r"^table\.csv, line \d: column 'chunks' holds a printed N"
    ):
        load_examples(path)


@pytest.mark.parametrize("context", [{"title": np.array(["A"])}, ["Ann", float("nan")]])
def test_what_pandas_prints_within_an_object_is_refused(tmp_path, context):
    """As one text, it would become the passage."""
    path = tmp_path / "table.csv"
    pandas.DataFrame({"question": ["Who?"], "context": [context]}).to_csv(path, index=False)
    with pytest.raises(ValueError, match="column 'context' holds a printed NumPy array or number"):
        load_examples(path)


def test_csv_is_told_by_the_last_suffix(tmp_path):
    path = save(tmp_path / "table.csv.jsonl", *ROWS)
    assert load_examples(path) == WANTED
    (tmp_path / "table.jsonl.CSV.gz").write_bytes(
        gzip.compress(b"question,chunks\nWho?,[1] Ann.\n")
    )
    assert load_examples(tmp_path / "table.jsonl.CSV.gz") == [RagExample("Who?", "[1] Ann.")]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_table_with_two_columns_of_one_name_is_refused(tmp_path, kind):
    """Only one of them would be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    arrays = [pa.array([text]) for text in ("Who?", "one", "two")]
    table = pa.Table.from_arrays(arrays, names=["question", "chunks", "chunks"])
    path = tmp_path / f"rows.{kind}"
    if kind == "parquet":
        pq.write_table(table, path)
    else:
        with pa.ipc.new_file(path, table.schema) as out:
            out.write(table)
    with pytest.raises(ValueError, match=r"^rows\.\w+: column 'chunks' is given 2 times"):
        load_examples(path)
