"""Reads raw records from files and the Hugging Face Hub, each with its place for error messages."""

from __future__ import annotations

import ast
import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import tokenize
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from blocktune.data.example import TEXT_KEYS, passages_in
from blocktune.data.sources.catalog import DataSet
from blocktune.parsing import refuse_doubles
from blocktune.prompt.format import require_unicode

WANTED = "a JSON list, JSON lines, CSV, Parquet or Arrow (also .gz, .bz2, .xz)"
_COMPRESSED = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open}
_TABLES = {b"PAR1": "parquet file", b"ARROW1": "arrow file", b"\xff\xff\xff\xff": "arrow stream"}
_UNSUPPORTED = {
    b"PK\x03\x04": "a zip archive or an Office file",
    b"\x28\xb5\x2f\xfd": "zstd (unzstd unpacks it)",
    b"\xff\xfe": "UTF-16 text (save it as UTF-8)",
    b"\xfe\xff": "UTF-16 text (save it as UTF-8)",
    b"version https://git-lfs": "a pointer of Git LFS (git lfs pull fetches the file)",
}
_ARRAY = re.compile(  # as NumPy and pandas print arrays, with texts or within objects
    r"\[\s*[{'\"].*[}'\"]\s*\]\s*"
    r"|[\[{]\s*(?=[\[{'\"]|array\(|nan\b).*\b(array\(\[|nan(?=\s*[,}\]])).*[}\]]\s*",
    re.DOTALL,
)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # escape of a surrogate, paired or lone

MOST_PARAGRAPHS = 10  # in the context of a SQuAD question, as in HotpotQA
_WRAPPERS = ("data", "rows", "examples", "instances", "records", "questions")  # in one object


class Record(NamedTuple):
    """A decoded record and its place, e.g. ``'docs.jsonl, line 7'``."""

    where: str
    value: Any


class LeftOut(ValueError):
    """Raised for an unusable row of a kind that its data set is known to contain."""


def read_records(path: str | Path) -> Iterator[Record]:
    """Reads a file. The format is detected by content, that of CSV by suffix.

    SQuAD articles are split into one record per question. Raises ValueError, naming file and line,
    for an unknown format, damage, duplicate keys or a text that is not valid Unicode.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"'{path}' is not a file; give {WANTED}")
    with path.open("rb") as file:
        head = file.read(32)
    if kind := _by_magic(head, _TABLES):
        yield from _from_table(path, kind)
        return
    if kind := _by_magic(head, _UNSUPPORTED):
        raise ValueError(f"{path.name} looks like {kind}, which is not read; give {WANTED}")
    opener = _by_magic(head, _COMPRESSED) or open
    named = path.with_suffix("") if path.suffix.lower() in (".gz", ".bz2", ".xz") else path
    try:
        with opener(path, "rt", encoding="utf-8-sig", newline="") as stream:
            if named.suffix.lower() in (".csv", ".tsv"):
                yield from _from_csv(path.name, stream)
                return
            for record in _from_json(path.name, stream):
                yield from _expand(record)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path.name} is not UTF-8 text ({error}); give {WANTED}") from None
    except RecursionError:
        raise ValueError(f"{path.name} nests lists or objects too deeply to be records") from None
    except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"{path.name} is damaged ({error}); copy it again") from None


def _by_magic(head: bytes, table: Mapping[bytes, Any]) -> Any:
    return next((kind for magic, kind in table.items() if head.startswith(magic)), None)


def _from_json(name: str, stream) -> Iterator[Record]:
    start = stream.read(4096).lstrip()
    if not start:
        raise ValueError(f"{name} is empty; give {WANTED}")
    stream.seek(0)
    line, _, rest = start.partition("\n")
    if start.startswith("[") or (line.strip() == "{" and rest):  # a list, or one indented object
        value = _decoded(stream.read(), name)
        if isinstance(value, list):
            yield from (Record(f"{name}, record {n}", entry) for n, entry in enumerate(value, 1))
        else:
            yield Record(f"{name}, line 1", value)
        return
    wanted = "; a file is a JSON list or one object a line"
    for number, line in enumerate(stream, start=1):
        if line.strip():
            where = f"{name}, line {number}"
            yield Record(where, _decoded(line, where, wanted))


def _decoded(text: str, where: str, wanted: str = "") -> Any:
    try:
        value = json.loads(text, object_pairs_hook=_unique_keys)
    except ValueError as error:  # also a key given twice, or a number of 5,000 digits
        reason = getattr(error, "msg", error)
        if not wanted and isinstance(error, json.JSONDecodeError):
            where = f"{where}, line {error.lineno}"
        elif not text.lstrip().startswith(("{", "[", '"')):
            wanted += ', such as {"text": "a passage"}'
        raise ValueError(f"{where}: not JSON ({reason}){wanted}") from None
    if _SURROGATE.search(text):
        _require_text(value, "", where)
    return value


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(unique := dict(pairs)) < len(pairs):
        refuse_doubles("key", [key for key, _ in pairs], "give it once")
    return unique


def _require_text(value: Any, name: str, where: str) -> None:
    if isinstance(value, str):
        require_unicode(value, f'{where}: field "{name}"')
    elif isinstance(value, list):
        for index, entry in enumerate(value):
            _require_text(entry, f"{name}[{index}]", where)
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            require_unicode(key, f"{where}: name of a field")
            _require_text(entry, f"{name}.{key}" if name else key, where)


def _from_csv(name: str, stream) -> Iterator[Record]:
    """Reads rows as objects; cells with a list or object are decoded."""
    csv.field_size_limit(sys.maxsize)  # a context is longer than the default of 128 KiB
    header = stream.readline()
    stream.seek(0)
    rows = csv.DictReader(stream, delimiter=max(",\t;|", key=header.count), strict=True)
    try:
        names = rows.fieldnames or []
        refuse_doubles(f"{name}: column", names, "rename one")
        for row in rows:
            where = f"{name}, line {rows.line_num}"
            if None in row or None in row.values():
                raise ValueError(f"{where}: the row does not have {len(rows.fieldnames)} columns")
            value = {key: _cell(text, where, key) for key, text in row.items()}
            if any(map(_SURROGATE.search, row.values())):
                _require_text(value, "", where)
            yield Record(where, value)
    except csv.Error as error:
        where = f"{name}, line {rows.reader.line_num}"
        hint = "put a text that holds quotes in quotes, and write its own twice"
        raise ValueError(f"{where}: not CSV ({error}); {hint}") from None
    if not names:
        raise ValueError(f"{name} is empty; give {WANTED}")


def _cell(text: str, where: str, column: str) -> Any:
    if text[:1] not in ("[", "{"):
        return text or None
    with suppress(ValueError):
        return json.loads(text)
    try:
        value = ast.literal_eval(text)  # pandas writes Python literals
        kinds = [token.type for token in tokenize.generate_tokens(io.StringIO(text).readline)]
        texts = [kind == tokenize.STRING for kind in kinds if kind != tokenize.NL]
        is_array = (True, True) in pairwise(texts)
    except (ValueError, SyntaxError, tokenize.TokenError):
        value, is_array = text, _ARRAY.fullmatch(text)
    if is_array:  # Python would join the texts of ['a' 'b']
        raise ValueError(
            f"{where}: column '{column}' holds a printed NumPy array or number ({text!r:.40}); "
            "write lists, as Series.map(list) makes them, or a Parquet file"
        )
    return value


def _from_table(path: Path, kind: str) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        if kind == "parquet file":
            batches = pq.ParquetFile(path).iter_batches()
        elif kind == "arrow stream":
            batches = pa.ipc.open_stream(pa.memory_map(str(path)))
        else:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        numbers = count(1)
        for batch in batches:
            refuse_doubles(f"{path.name}: column", batch.schema.names, "rename one")
            for row in batch.to_pylist():
                yield Record(f"{path.name}, record {next(numbers)}", row)
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path.name} is not a whole {kind} ({reason})") from None


def _expand(record: Record) -> Iterator[Record]:
    """Yields a record, or those nested in it: a list, columns, by question id, or as in SQuAD."""
    value = record.value if isinstance(record.value, Mapping) else {}
    # The Hub's data set viewer ("features") and pandas ("schema") describe the columns.
    lists = {k for k, v in value.items() if isinstance(v, list | dict)} - {"features", "schema"}
    holder = min(lists) if len(lists) == 1 and lists <= {*_WRAPPERS} else None
    is_passage = any(isinstance(value.get(key), str) for key in TEXT_KEYS if key != "segment")
    question, paragraphs = value.get("question"), value.get("paragraphs")
    if (
        isinstance(question, Mapping)
        and question
        and "text" not in question
        and all(isinstance(c, Mapping) and c.keys() == question.keys() for c in value.values())
    ):  # DataFrame.to_json: columns of rows by their index
        value = {name: list(column.values()) for name, column in value.items()}
        question = value["question"]
    nested: list[tuple[str, Any]] = []
    if isinstance(value.get(holder), list) and question is None and not is_passage:
        nested = [(f"{holder}[{index}]", entry) for index, entry in enumerate(value[holder])]
    elif isinstance(question, list) and all(
        isinstance(column, list) and len(column) == len(question) for column in value.values()
    ):
        rows = enumerate(passages_in(value, "rows"), start=1)
        nested = [(f"row {index}", row) for index, row in rows]
    elif {"row_idx", "row"} <= value.keys():  # from the Hub's data set viewer
        nested = [("row", value["row"])]
    elif value and all(isinstance(v, Mapping) and "question" in v for v in value.values()):
        nested = [(str(key), {"id": str(key)} | entry) for key, entry in value.items()]
    elif isinstance(paragraphs, list) and any(
        isinstance(p, Mapping) and {"context", "qas"} <= p.keys() for p in paragraphs
    ):
        yield from _questions_of(record)
    else:
        yield record
    for name, entry in nested:
        yield from _expand(Record(f"{record.where}, {name}", entry))


def _questions_of(article: Record) -> Iterator[Record]:
    """Makes a record of each question of a SQuAD article, over its own and other paragraphs.

    Up to `MOST_PARAGRAPHS` - 1 others are drawn, seeded by the question's id, and kept in order.
    """
    title, paragraphs = article.value.get("title"), article.value["paragraphs"]
    for own, paragraph in enumerate(paragraphs):
        try:
            questions = list(paragraph["qas"])
            chunks = [{"title": title, "text": p["context"]} for p in paragraphs]
            for index, question in enumerate(questions):
                where = f"{article.where}, paragraphs[{own}].qas[{index}]"
                rng = Random(f"squad/{question.get('id', where)}")
                others = [i for i in range(len(chunks)) if i != own]
                kept = sorted([own, *rng.sample(others, min(len(others), MOST_PARAGRAPHS - 1))])
                fields = {**question, "chunks": [chunks[i] for i in kept]}
                yield Record(where, fields | {"supporting": [kept.index(own)]})
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(
                f"{article.where}: paragraphs[{own}] is not as in SQuAD (context, qas with "
                f"question, answers): {error!r:.60}"
            ) from None


def read_hub(
    source: DataSet, split: str | None = None, limit: int | None = None, shuffle: int | None = None
) -> Iterator[Record]:
    """Reads a data set with the library ``datasets``. A streamed data set needs a limit.

    ``shuffle`` seeds a random order; a streamed data set is shuffled only within a buffer.
    """
    split, name = split or source.split, source.at
    if source.streamed and limit is None:
        raise ValueError(f"'{name}' is too large to load as a whole; give a limit")
    from datasets import get_dataset_split_names, load_dataset, load_from_disk

    where = {"path": source.hub, "revision": source.revision}
    saved: Mapping[str, Any] = {}
    try:
        if any((Path(source.hub) / file).is_file() for file in ("state.json", "dataset_dict.json")):
            saved = load_from_disk(source.hub)
            saved = saved if isinstance(saved, Mapping) else {str(saved.split or "train"): saved}
        if not split:
            names = saved or get_dataset_split_names(**where, config_name=source.config)
            split = "validation" if "validation" in names else "train"
        if saved and split not in saved:
            raise ValueError(f"it has the split {' and '.join(saved)}; name one: ?split=")
        more = {"name": source.config, "streaming": source.streamed}
        rows = saved[split] if saved else load_dataset(**where, split=split, **more)
        if shuffle is None or source.streamed:
            numbered = enumerate(rows if shuffle is None else rows.shuffle(seed=shuffle), start=1)
        else:
            order = Random(shuffle).sample(range(len(rows)), len(rows))
            numbered = ((index + 1, rows[index]) for index in order)
        for number, row in numbered:  # number within the data set, except in a shuffled stream
            yield Record(f"{name} ({split}), record {number}", row)
    except Exception as error:  # damaged or unexpected files raise errors of any type
        error = (type(error).__name__ == "DatasetGenerationError" and error.__cause__) or error
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if "scripts are no longer supported" in reason:
            reason += f"; try the Hub's own copy: hf:{source.hub}@refs/convert/parquet"
        raise ValueError(f"cannot load 'hf:{name}' (split '{split}'): {reason}") from None


def parse_record(record: Record, parse, types=dict) -> Any:
    """Applies ``parse`` to a record's value. Errors become a ValueError that names its place."""
    try:
        if not isinstance(record.value, types):
            raise ValueError(f"must be an object, got {type(record.value).__name__}")
        return parse(record.value)
    except LeftOut:
        raise
    except ValueError as error:
        raise ValueError(f"{record.where}: {error}") from None
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{record.where}: not of the shape that is read ({error!r})") from None
