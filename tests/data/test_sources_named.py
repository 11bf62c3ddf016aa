"""Sources that are named, not files: the Hub (a folder stands in for it) and worlds."""

import gzip
import json
from dataclasses import replace

import pytest
from datasets import Dataset, DatasetDict
from source_records import HUB_HOTPOT, MUSIQUE, WIKI

from blocktune.commands.application import explain
from blocktune.data import build_chunker, load_examples
from blocktune.data.sources import records as hub
from blocktune.data.sources.catalog import data_set, data_sets_in


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A data set as the Hub stores it: files by split, read through `datasets`."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")

    def make(records: list[dict], kind: str = "json"):
        import datasets

        path = tmp_path / "set"
        path.mkdir()
        if kind == "parquet":
            datasets.Dataset.from_list(records).to_parquet(path / "validation.parquet")
        else:
            lines = "\n".join(map(json.dumps, records))
            (path / "validation.json").write_text(lines, encoding="utf-8")
        return path

    return make


@pytest.mark.parametrize(("record", "kind"), [(HUB_HOTPOT, "json"), (MUSIQUE, "parquet")])
def test_hub_matches_file(folder, tmp_path, record, kind):
    (tmp_path / "set.json").write_text(json.dumps([record]), encoding="utf-8")
    from_file = load_examples(tmp_path / "set.json")
    path = folder([record] * 3, kind)
    assert load_examples(f"hf:{path}") == from_file * 3
    assert load_examples(f"hf:{path}?split=validation", limit=2) == from_file * 2
    assert load_examples(f"hf:{path}:default", split="validation") == from_file * 3


@pytest.mark.parametrize("streamed", [False, True])
def test_a_seeded_order_takes_of_everything(folder, tmp_path, monkeypatch, streamed):
    records = [HUB_HOTPOT | {"id": f"{i:02}"} for i in range(40)]
    monkeypatch.setattr(
        "blocktune.data.sources.load.data_set",
        lambda name: replace(data_set(name), streamed=streamed),
    )
    (tmp_path / "set.json").write_text(json.dumps(records), encoding="utf-8")
    for source in (f"hf:{folder(records)}", str(tmp_path / "set.json")):
        plain = [example.id for example in load_examples(source, limit=40)]
        assert plain == sorted(plain)
        first, again, other = (
            [example.id for example in load_examples(f"{source}?shuffle={seed}", limit=40)]
            for seed in (0, 0, 1)
        )
        assert first == again != other
        assert sorted(first) == sorted(other) == plain != first
        assert [e.id for e in load_examples(f"{source}?shuffle=0", limit=5)] == first[:5]


def test_a_wrong_row_is_named_by_its_place_in_the_set(folder):
    records = [HUB_HOTPOT | {"id": str(i)} for i in range(6)] + [HUB_HOTPOT | {"answer": " "}]
    with pytest.raises(ValueError, match=r"record 7: field \"answers\""):
        load_examples(f"hf:{folder(records)}?shuffle=3")


def test_what_save_to_disk_wrote(tmp_path):
    rows = Dataset.from_list([HUB_HOTPOT | {"id": str(i)} for i in range(3)])
    rows.save_to_disk(tmp_path / "one", num_shards=2)
    DatasetDict(train=rows, test=rows.select([2])).save_to_disk(tmp_path / "two")
    for name, split, ids in (("one", None, "012"), ("two", None, "012"), ("two", "test", "2")):
        found = load_examples(f"hf:{tmp_path / name}", split=split)
        assert "".join(example.id for example in found) == ids
    with pytest.raises(ValueError, match=r"'test'.* the split train; name one"):
        load_examples(f"hf:{tmp_path / 'one'}", split="test")  # they are no test set
    with pytest.raises(ValueError, match=r"'dev'.* the split train and test; name one"):
        load_examples(f"hf:{tmp_path / 'two'}", split="dev")
    DatasetDict(test=rows).save_to_disk(tmp_path / "three")
    with pytest.raises(ValueError, match=r"'train'.* the split test; name one"):
        load_examples(f"hf:{tmp_path / 'three'}")


def test_two_wiki_rows_without_context(folder):
    dicts = {"context": {"title": ["A"], "sentences": [["One."]]}}
    dicts |= {"supporting_facts": {"title": ["A"], "sent_id": [0]}, "evidences": []}
    path = folder([WIKI | dicts | {"context": None}, WIKI | dicts], "parquet")
    assert [example.id for example in load_examples(f"hf:{path}")] == ["w1"]


def test_wrong_record_is_named(folder):
    path = folder([MUSIQUE, MUSIQUE | {"question": " "}])
    message = r'set \(validation\), record 2: field "question" must be a non-blank string'
    with pytest.raises(ValueError, match=message):
        load_examples(f"hf:{path}")


def test_unreachable_set_is_one_line(tmp_path):
    (tmp_path / "damaged.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-9])
    for name in ("hf:", f"hf:{tmp_path}"):  # datasets raises anything
        with pytest.raises(ValueError, match=f"^cannot load '{name}'"):
            load_examples(name)
    with pytest.raises(
        ValueError, match=r"^cannot load 'hf:nobody/no-set' \(split 'train'\): "
    ) as e:
        load_examples("hf:nobody/no-set", split="train")
    assert "\n" not in str(e.value)


def test_a_revision_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "datasets.load_dataset", lambda **given: asked.append(given) or [HUB_HOTPOT]
    )
    load_examples("hf:owner/name@refs/convert/parquet:part?split=test")
    (given,) = asked
    wanted = ("owner/name", "refs/convert/parquet", "part")
    assert (given["path"], given["revision"], given["name"]) == wanted
    assert list(data_sets_in("hf:owner/name@v1:part")) == ["owner/name"]


def test_the_reason_why_a_folder_cannot_be_loaded_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path.parent / "cache")
    (tmp_path / "a.jsonl").write_text('{"question": "q", "chunks": ["a"]}\n')
    (tmp_path / "b.jsonl").write_text('{"question": "q", "chunks": [{"text": "a"}]}\n')
    with pytest.raises(ValueError, match=r"cannot load .*(cast|convert)"):
        load_examples(f"hf:{tmp_path}")
    (tmp_path / f"{tmp_path.name}.py").write_text("")
    with pytest.raises(ValueError, match=r"scripts are no longer .*@refs/convert/parquet"):
        load_examples(f"hf:{tmp_path}")


def test_missing_datasets_package(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match="datasets") as error:
        next(hub.read_hub(data_set("owner/name")))
    assert "pip install 'blocktune[data]'" in explain(error.value)


def test_worlds():
    examples = load_examples("worlds:test?seed=1&n=6&kinds=2-hop,comparison&passages=4-6")
    assert len(examples) == 6
    assert {example.kind for example in examples} <= {"2-hop", "comparison"}
    assert all(4 <= len(example.chunks) <= 6 for example in examples)
    again = load_examples("worlds:test?seed=1&n=6&kinds=2-hop,comparison&passages=4-6", limit=2)
    assert again == examples[:2]
    assert load_examples("worlds:dev?seed=2&n=1") != load_examples("worlds:dev?seed=3&n=1")


LONG = ",".join(f"field_{i}:column_{i}" for i in range(20))  # longer than any file's name


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("worlds:test?sed=1", "unknown option 'sed' of 'worlds:test'; known: seed"),
        ("worlds:test?seed=x", "worlds:test: 'seed' must be a whole number, got 'x'"),
        ("worlds:test?passages=a-b", "'passages' must be a whole number or LOW-HIGH"),
        ("worlds:test?seed", "that are not key=value&key=value"),
        ("worlds:test?seed=", "that are not key=value&key=value"),
        ("worlds:tset", "split must be one of train, dev, test, got 'tset'"),
        ("hf:owner/name?sed=1", "unknown option 'sed' of 'hf:owner/name"),
        ("hf:owner/name?shots=x", "'shots' must be a whole number, got 'x'"),
        ("hf:owner/name?shots=0", "'shots' must be at least 1, got 0"),
        ("hf:owner/name?chunker=x", "unknown chunker 'x'; available: delimiter"),
        ("hf:owner/name?chunker=fixed&sise=3", "'sise' of 'chunker=fixed'; known: size, overlap"),
        ("hf:owner/name?chunker=fixed&size=x", "chunker=fixed: 'size' must be a whole number"),
        ("hf:owner/name?split=a&split=b", "option 'split' is given 2 times"),
        ("fineweb", "is too large to load as a whole; give a limit"),
        ("missing.jsonl", "no file 'missing.jsonl'; a source is"),
        (f"missing.csv?fields={LONG}", "no file 'missing.csv"),
    ],
)
def test_bad_name_is_refused(source, message):
    with pytest.raises(ValueError, match=message):
        load_examples(source)


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(ValueError, match="limit must be at least 1 or None, got 0"):
        load_examples("worlds:test", limit=0)
    with pytest.raises(ValueError, match="'worlds:test' has no splits"):
        load_examples("worlds:test", split="train")
    with pytest.raises(ValueError, match="'worlds:test' has chunks already; leave the chunker out"):
        load_examples("worlds:test", chunker=build_chunker("sentence"))


def test_a_data_set_without_a_validation_split_is_read_by_its_training_split(folder):
    path = folder([MUSIQUE])
    (path / "validation.json").rename(path / "train.json")
    assert len(load_examples(f"hf:{path}")) == 1
    with pytest.raises(ValueError, match="split 'validation'"):
        load_examples(f"hf:{path}", split="validation")
