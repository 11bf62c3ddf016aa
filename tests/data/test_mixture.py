"""Mixtures: exact shares, both ways to draw, the same every time, strict YAML."""

import json
from collections import Counter
from pathlib import Path

import pytest

from blocktune.data import RagExample, load_mixture, write_jsonl
from blocktune.data.mixture import BLOCK, FULL, mix, parse_mixture
from blocktune.data.sources.catalog import CATALOG
from blocktune.data.sources.options import GENERATORS
from blocktune.prompt import Chunk

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """Two files, ``a.jsonl`` of 10 examples and ``b.jsonl`` of 4, in the current directory."""
    monkeypatch.chdir(tmp_path)
    for name, count in (("a", 10), ("b", 4)):
        examples = [
            RagExample(
                f"{name}{i}?",
                (Chunk(f"{name}{i} one"), Chunk(f"{name}{i} two")),
                (name,),
                supporting=(0,),
            )
            for i in range(count)
        ]
        write_jsonl(f"{name}.jsonl", examples)


def read(**values):
    return parse_mixture(values, "m.yaml")


def test_duplication_gives_every_example_in_each_of_its_modes(sources):
    mixed = mix(read(parts=[{"source": "a.jsonl", "mode": "both"}, {"source": "b.jsonl"}]))
    modes = Counter((item.part, item.mode) for item in mixed.examples)
    assert modes == {(0, BLOCK): 10, (0, FULL): 10, (1, BLOCK): 4}
    pairs = Counter(item.example.question for item in mixed.examples if item.part == 0)
    assert set(pairs.values()) == {2}
    assert [count[1:] for count in mixed.parts] == [(10, 10, 10, 1.0), (4, 4, 0, 1.0)]
    assert [item.part for item in mixed.examples] != sorted(item.part for item in mixed.examples)


def test_weight_under_duplication_is_how_often_rows_are_taken(sources):
    parts = [{"source": "a.jsonl", "weight": 0.5}, {"source": "b.jsonl", "weight": 2.5}]
    mixed = mix(read(parts=parts))
    counts = Counter(item.example.question for item in mixed.examples)
    assert sum(counts[f"a{i}?"] for i in range(10)) == 5
    assert sorted(counts[f"b{i}?"] for i in range(4)) == [2, 2, 3, 3]


def test_sampling_shares_out_by_weight_exactly(sources):
    parts = [
        {"source": "a.jsonl", "mode": "full", "weight": 60},
        {"source": "b.jsonl", "mode": "block", "weight": 40},
    ]
    mixed = mix(read(parts=parts, draw="sampling", size=50))
    assert Counter(item.mode for item in mixed.examples) == {FULL: 30, BLOCK: 20}
    counts = Counter(item.example.question for item in mixed.examples)
    assert set(counts.values()) == {3, 5}
    assert [count.epochs for count in mixed.parts] == [3.0, 5.0]


@pytest.mark.parametrize("size", [7, 8, 10, 11])
def test_sampled_shares_add_up(sources, size):
    parts = [{"source": "a.jsonl", "weight": w} for w in (1, 1, 1)]
    mixed = mix(read(parts=parts, draw="sampling", size=size))
    assert len(mixed.examples) == size
    assert {count.block for count in mixed.parts} <= {size // 3, size // 3 + 1}


def test_the_seed_alone_decides(sources):
    def drawn(seed):
        part = {"source": "a.jsonl", "augment": {"shuffle": True}}
        return mix(read(parts=[part], draw="sampling", size=30, seed=seed)).examples

    assert drawn(0) == drawn(0)
    assert drawn(0) != drawn(1)


def test_augmentation_varies_each_time_and_is_shared_by_both_modes(sources):
    part = {"source": "b.jsonl", "mode": "both", "weight": 5}
    part["augment"] = {"num_chunks": 4, "shuffle": True}
    mixed = mix(read(parts=[part])).examples
    of_one = [item for item in mixed if item.example.question == "b0?"]
    contexts = Counter(item.example.chunks for item in of_one)
    assert len(contexts) > 1
    assert all(count % 2 == 0 for count in contexts.values())
    assert {len(item.example.chunks) for item in mixed} == {4}


def test_part_options_reach_the_loader(tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = "Anna Belt was born in Port Alder. " * 4
    (tmp_path / "docs.json").write_text(json.dumps([{"text": text}] * 3), encoding="utf-8")
    part = {"source": "docs.json?as=document", "limit": 2, "mode": "full"}
    part["chunker"] = {"name": "fixed", "size": 10}
    mixed = mix(read(parts=[part]), tokenizer=tokenizer)
    assert len(mixed.examples) == 2
    lengths = [len(tokenizer(c.text)["input_ids"]) for c in mixed.examples[0].example.chunks]
    assert max(lengths) <= 11


def test_to_dict_reads_back(sources, tmp_path):
    part = {"source": "a.jsonl", "mode": "full", "weight": 2, "limit": 3}
    part |= {"chunker": {"name": "fixed", "size": 7}, "augment": {"num_chunks": [2, 3]}}
    mixture = read(parts=[part, "b.jsonl"], draw="sampling", size=9, seed=4)
    path = tmp_path / "again.yaml"
    path.write_text(json.dumps(mixture.to_dict()))  # as an adapter's metadata holds it
    assert load_mixture(path) == mixture


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "m.yaml: 'parts': must be a list"),
        ({"parts": ["a"], "sed": 1}, "m.yaml: unknown key 'sed'; known: parts, draw"),
        ({"parts": [{"mode": "full"}]}, r"m.yaml: parts\[0\]: 'source' is missing"),
        ({"parts": ["a", 3]}, r"m.yaml: parts\[1\]: must be a mapping of keys to values, got 3"),
        ({"parts": [{"source": "a", "wieght": 1}]}, r"parts\[0\]: unknown key 'wieght'"),
        ({"parts": [{"source": "a", "mode": "half"}]}, "'mode' must be one of block, full, both"),
        ({"parts": [{"source": "a", "weight": 0}]}, "'weight' must be above 0, got 0; or drop"),
        ({"parts": [{"source": "a", "weight": "x"}]}, "'weight' must be a number, got 'x'"),
        ({"parts": [{"source": "a", "limit": 0}]}, "'limit' must be a whole number, at least 1"),
        ({"parts": [{"source": "a", "chunker": "x"}]}, r"parts\[0\]: chunker: unknown chunker 'x'"),
        ({"parts": [{"source": "a", "augment": {"x": 1}}]}, "augment: unknown key 'x'"),
        ({"parts": ["a"], "draw": "luck"}, "'draw' must be one of .* got 'luck'"),
        ({"parts": ["a"], "draw": "sampling"}, "draw: sampling needs 'size'"),
        ({"parts": ["a"], "size": 3}, "'size' belongs to draw: sampling"),
        ({"parts": ["a"], "seed": "x"}, "'seed' must be a whole number"),
        (
            {"parts": [{"source": "a", "mode": "both"}], "draw": "sampling", "size": 3},
            "mode: both belongs to draw: duplication",
        ),
    ],
)
def test_bad_yaml_is_one_line(values, message):
    with pytest.raises(ValueError, match=message) as error:
        read(**values)
    assert str(error.value).startswith("m.yaml: ")
    assert "\n" not in str(error.value)


def test_bad_file_is_one_line(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no mixture at 'none\.yaml'; give a YAML file"):
        load_mixture("none.yaml")
    path = tmp_path / "m.yaml"
    path.write_text("parts: [")
    with pytest.raises(ValueError, match=r"m\.yaml: not YAML"):
        load_mixture(path)
    path.write_text("- a")
    with pytest.raises(ValueError, match="must be a mapping"):
        load_mixture(path)


def test_a_part_that_gives_nothing_is_refused(sources):
    with pytest.raises(ValueError, match=r"of 'b\.jsonl' is taken"):
        mix(read(parts=[{"source": "b.jsonl", "weight": 0.1}]))


@pytest.mark.parametrize(
    "path", sorted((ROOT / "recipes" / "mixtures").iterdir()), ids=lambda path: path.name
)
def test_shipped_mixture_reads_and_names_known_sources(path):
    mixture = load_mixture(path)
    assert path.read_text().startswith(f"# blocktune data mix recipes/mixtures/{path.name}")
    for part in mixture.parts:
        name = part.source.partition("?")[0].partition(":")[0]
        assert name in CATALOG or name in GENERATORS or name.startswith("out/data/")


def test_kvlink_is_60_to_40():
    parts = load_mixture(ROOT / "recipes" / "mixtures" / "kvlink.yaml").parts
    weights = Counter()
    for part in parts:
        weights[part.mode] += part.weight
    assert weights == {FULL: 60, BLOCK: 40}


def test_generated_mixture_draws():
    mixed = mix(load_mixture(ROOT / "recipes" / "mixtures" / "generated.yaml"))
    assert Counter(item.mode for item in mixed.examples) == {BLOCK: 600, FULL: 500}
