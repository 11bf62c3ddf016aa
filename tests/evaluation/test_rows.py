"""Rows on disk: parts of processes, half-written lines, and what makes two rows the same."""

import json
import math
import sys
from dataclasses import asdict, replace

import pytest

from blocktune.data import RagExample
from blocktune.evaluation import rows as code
from blocktune.evaluation.rows import Row, RowFile, place_of, read_all, read_rows, row_key
from blocktune.evaluation.suite import MethodSpec, TaskSpec
from blocktune.methods import build
from blocktune.methods.base import METHODS
from blocktune.prompt import Chunk

KEYS = ["a", "b", "c", "d"]
CHUNKS = tuple(Chunk(text) for text in ("Anna.", "Belt.", "Kirby."))
EXAMPLE = RagExample("Where?", CHUNKS, ("Kirby",), supporting=(1, 2))
TASK = TaskSpec("mine", "questions.jsonl")
AS_IS = "as-is"  # how the store keeps chunks


def row(key: str) -> Row:
    return Row(key, "mine", key, "", "x", "x", 1.0, 1.0, 1.0, 0.0, {}, score=1.0)


def lines(path) -> list[str]:
    return [json.loads(line)["key"] for line in path.read_text().splitlines()]


def test_processes_write_parts_that_merge_in_the_order_of_questions(tmp_path):
    first, second = (RowFile(tmp_path, "naive", KEYS, rank) for rank in (0, 1))
    second.append([row("d"), row("b")])
    first.append([row("c"), row("a")])
    assert not (tmp_path / "naive.jsonl").exists()
    assert [r.key for r in first.merge()] == KEYS
    assert [path.name for path in tmp_path.iterdir()] == ["naive.jsonl"]
    assert lines(tmp_path / "naive.jsonl") == KEYS


def test_a_stopped_part_is_read_up_to_its_half_written_line(tmp_path):
    file = RowFile(tmp_path, "naive", KEYS)
    file.append([row("a")])
    part = tmp_path / "naive.part0.jsonl"
    part.write_text(part.read_text() + '{"key": "b", "ta')
    again = RowFile(tmp_path, "naive", KEYS)
    assert not again.lacks([0])
    assert again.lacks([0, 1])
    again.append([row("b")])
    assert lines(part) == ["a", "b"]


def test_a_run_with_fewer_processes_finds_all_parts(tmp_path):
    for rank, key in enumerate(KEYS):
        RowFile(tmp_path, "naive", KEYS, rank).append([row(key)])
    assert [r.key for r in RowFile(tmp_path, "naive", KEYS).merge()] == KEYS


def test_rows_of_another_run_are_left_out(tmp_path):
    file = RowFile(tmp_path, "naive", KEYS)
    file.append([row(key) for key in KEYS])
    file.merge()
    other = RowFile(tmp_path, "naive", ["a", "z"])
    assert not other.lacks([0])
    other.append([row("z")])
    assert [r.key for r in other.merge()] == ["a", "z"]


def test_an_unfinished_run_does_not_merge(tmp_path):
    file = RowFile(tmp_path, "naive", KEYS)
    file.append([row("a")])
    with pytest.raises(KeyError):
        file.merge()
    assert (tmp_path / "naive.part0.jsonl").exists()


def test_what_is_no_row_is_refused_with_its_line(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"key": "a"}\n')
    with pytest.raises(ValueError, match=r"x\.jsonl, line 1: not a row of this version"):
        list(read_rows(tmp_path / "x.jsonl"))
    for wrong in ({"score": None}, {"em": "1"}, {"id": 3}, {"score": 70.0}, {"f1": math.nan}):
        (tmp_path / "x.jsonl").write_text(json.dumps(asdict(row("a")) | wrong) + "\n")
        with pytest.raises(ValueError, match=r"x\.jsonl, line 1: not a row of this version"):
            list(read_rows(tmp_path / "x.jsonl"))
    with pytest.raises(ValueError, match="no rows of 'naive'"):
        read_all(tmp_path, ["naive"])


def test_all_that_decides_an_answer_is_in_the_key():
    plain = row_key(MethodSpec("naive"), TASK, EXAMPLE, "weights", "code", AS_IS)
    changed = [
        row_key(MethodSpec("epic"), TASK, EXAMPLE, "weights", "code", AS_IS),
        row_key(MethodSpec("naive", budget=0.1), TASK, EXAMPLE, "weights", "code", AS_IS),
        row_key(
            MethodSpec("naive"), replace(TASK, max_new_tokens=5), EXAMPLE, "weights", "code", AS_IS
        ),
        row_key(MethodSpec("naive"), replace(TASK, prompt={}), EXAMPLE, "weights", "code", AS_IS),
        row_key(
            MethodSpec("naive"), TASK, replace(EXAMPLE, question="Who?"), "weights", "code", AS_IS
        ),
        row_key(MethodSpec("naive"), TASK, EXAMPLE, "other", "code", AS_IS),
        row_key(MethodSpec("naive"), TASK, EXAMPLE, "weights", "other code", AS_IS),
        row_key(MethodSpec("naive"), TASK, EXAMPLE, "weights", "code", "int4"),
    ]
    assert len({plain, *changed}) == 1 + len(changed)


def test_labels_and_paths_are_not_in_the_key():
    keys = {
        row_key(MethodSpec("naive", adapter="out/a", label="x"), TASK, EXAMPLE, "w", "c", AS_IS),
        row_key(MethodSpec("naive"), replace(TASK, source="b", limit=9), EXAMPLE, "w", "c", AS_IS),
    }
    assert len(keys) == 1


PLUGIN = """
from blocktune.methods import FirstK, Method, Selection, register

@register("mine")
class Mine(Method):
    def select(self) -> Selection:
        return FirstK(k={k})
"""


def test_the_code_of_a_plugin_decides_the_rows_of_its_methods_alone(tmp_path, monkeypatch):
    digests = {}
    for folder, k in (("a", 2), ("b", 40), ("c", 2)):
        path = tmp_path / folder / "mine.py"
        path.parent.mkdir()
        path.write_text(PLUGIN.format(k=k))
        monkeypatch.setattr(METHODS, "_entries", dict(METHODS.table()))
        monkeypatch.delitem(METHODS._entries, "mine", raising=False)
        monkeypatch.setenv("BLOCKTUNE_PLUGINS", str(path))
        for text in ("mine", "mine + deviation 15 %", "naive", "cache-craft"):
            digests[folder, text] = code.code_digest(build(text))
    for text in ("mine", "mine + deviation 15 %"):
        assert digests["a", text] == digests["c", text] != digests["b", text]  # wherever it lies
    assert {digests[folder, text] for folder in "abc" for text in ("naive", "cache-craft")} == {
        code.code_digest()
    }


def test_the_code_of_modules_that_a_plugin_imports_decides_too(tmp_path, monkeypatch):
    digests = []
    text = PLUGIN.replace("k={k}", "k=deeper.K").replace(
        "\nfrom", "\nimport helper_of_mine\nfrom", 1
    )
    for k in (2, 40):
        folder = tmp_path / str(k)
        folder.mkdir()
        (folder / "mine.py").write_text(text.replace("deeper.K", "helper_of_mine.K"))
        (folder / "helper_of_mine.py").write_text("from deeper_of_mine import K\n")
        (folder / "deeper_of_mine.py").write_text(f"import json, torch\nK = {k}\n")
        monkeypatch.syspath_prepend(folder)
        for name in ("helper_of_mine", "deeper_of_mine"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.setattr(METHODS, "_entries", dict(METHODS.table()))
        monkeypatch.delitem(METHODS._entries, "mine", raising=False)
        monkeypatch.setenv("BLOCKTUNE_PLUGINS", str(folder / "mine.py"))
        digests.append(code.code_digest(build("mine")))
    assert digests[0] != digests[1]


def test_the_digest_of_code_covers_what_answers_and_nothing_else():
    root = code.Path(code.blocktune.__file__).parent
    assert all((root / part).exists() for part in code.PARTS)
    assert code.code_digest().startswith(f"{code.blocktune.__version__}-")
    assert not any(part.startswith(("commands", "training", "serve")) for part in code.PARTS)


def test_the_place_of_the_evidence_is_its_mean():
    assert place_of(EXAMPLE) == 0.75
    assert place_of(replace(EXAMPLE, supporting=())) is None
