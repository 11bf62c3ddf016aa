"""Every short name loads through `datasets`; folders of the same name stand in for the Hub."""

import pytest
from source_records import HUB_HOTPOT, MUSIQUE

from blocktune.data import load_examples
from blocktune.data.sources.catalog import CATALOG, is_test_split
from blocktune.data.sources.shapes import SHAPES

TURNS = ["Who?", "Anna.", "Where?", "In Kirby."]
ROLES = ["user", "assistant"] * 2
CHAT = {
    "id": "c",
    "messages": [{"role": r, "content": t} for r, t in zip(ROLES, TURNS, strict=True)],
    "source": "made up",
}
EVIDENCE = {
    "question": "Who?",
    "question_id": "q",
    "entity_pages": {"title": ["A"], "wiki_context": ["Anna.\n\nBelt."]},
    "search_results": {"title": ["S"], "search_context": ["Anna Belt"]},
    "answer": {"value": "Anna", "aliases": ["Ann"]},
}
NONE = {"title": [], "wiki_context": []}
RECORDS = {
    "2wikimultihopqa": HUB_HOTPOT,
    "hotpotqa": HUB_HOTPOT,
    "musique": MUSIQUE,
    "triviaqa": EVIDENCE,
    "triviaqa-questions": EVIDENCE,
    "nq": {"question": "who?", "answer": ["Anna", "Ann"]},
    "tulu-3": CHAT,
    "xsum": {"id": "x", "document": "One.\nTwo.", "summary": "Both."},
    "multi-news": {"document": "One. ||||| Two.", "summary": "Both."},
    "samsum": {"id": "s", "dialogue": "A: hi", "summary": "Hi."},
    "fineweb": {"id": "f", "text": "One.\n\nTwo.", "url": "https://example.org"},
}
WITHOUT_PASSAGES = ("nq", "triviaqa-questions")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Writes a repository of one split as the Hub has it, in the current directory."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(tmp_path)

    def make(name: str, records: list[dict]) -> None:
        entry = CATALOG[name]
        folder = tmp_path / entry.hub / (entry.config or "default")
        folder.mkdir(parents=True)
        datasets.Dataset.from_list(records).to_parquet(folder / f"{entry.split}.parquet")
        config = f"configs:\n- config_name: {entry.config or 'default'}\n  data_files:\n"
        config += f"  - split: {entry.split}\n    path: {folder.name}/{entry.split}.parquet\n"
        (tmp_path / entry.hub / "README.md").write_text(f"---\n{config}---\n")

    return make


def test_every_data_set_is_tried():
    assert RECORDS.keys() == CATALOG.keys()


@pytest.mark.parametrize("name", sorted(CATALOG.keys() - set(WITHOUT_PASSAGES)))
def test_short_name_loads(hub, name):
    hub(name, [RECORDS[name]] * 8)
    limit = 7 if CATALOG[name].streamed else None
    examples = load_examples(name, limit=limit)
    assert len(examples) == (limit or 8)
    assert all(example.chunks and example.target for example in examples)


@pytest.mark.parametrize("name", WITHOUT_PASSAGES)
def test_questions_without_passages_say_what_to_do(hub, name):
    record = RECORDS[name]
    if "entity_pages" in record:
        record = record | {"entity_pages": NONE, "search_results": {}}
        record.pop("search_results")
    hub(name, [record])
    with pytest.raises(ValueError, match=r"add (them: |passages with )`blocktune data passages`"):
        load_examples(name)


def test_catalog_says_what_a_user_must_know():
    keys = {shape.key for shape in SHAPES}
    for entry in CATALOG.values():
        assert entry.licence
        assert entry.becomes
        assert entry.hub.count("/") == 1
        assert entry.shape is None or entry.shape in keys


@pytest.mark.parametrize(
    ("source", "split", "is_test"),
    [
        ("data/qa_test.jsonl", None, True),
        ("data/testset.jsonl.gz", None, True),
        ("tests-2.csv", None, True),
        ("hf:owner/name?split=test[:10%]", None, True),
        ("musique", "test", True),
        ("tests/latest.jsonl", None, False),
        ("contest.jsonl", None, False),
        ("musique?split=train", "test", False),
    ],
)
def test_a_test_split_is_known_by_its_name(source, split, is_test):
    assert is_test_split(source, split) is is_test
