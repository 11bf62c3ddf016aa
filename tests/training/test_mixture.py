"""A run on a mixture: each source in the mode that the mixture says, named in the adapter."""

import pytest
import yaml
from training.runs import make_trainer, write_run
from training.toy import toy_examples

from blocktune.data.example import write_jsonl


def mixture(folder, *parts: dict, **more) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    write_jsonl(folder / "a.jsonl", toy_examples(6))
    write_jsonl(folder / "b.jsonl", toy_examples(4, chunks=2))
    sources = [{"source": str(folder / f"{name}.jsonl")} for name in "ab"]
    entries = [source | part for source, part in zip(sources, parts, strict=True)]
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump({"parts": entries, **more}))
    return str(path)


def modes(trainer) -> list[tuple[int, bool]]:
    parts = [part for record in trainer.train_dataset for part in record["parts"]]
    return sorted((len(part["chunks"]), part["block"]) for part in parts)


def test_each_source_is_trained_in_its_mode(tmp_path):
    path = mixture(tmp_path / "data", {"mode": "block"}, {"mode": "full", "weight": 2})
    trainer = make_trainer(tmp_path, train_data=None, mixture=path, max_steps=1)
    assert modes(trainer) == [(2, False)] * 8 + [(3, True)] * 6
    facts = trainer.files.info.training["data"]
    assert [part["mode"] for part in facts["parts"]] == ["block", "full"]
    trainer.train()


def test_kvlinks_shares_by_sampling(tmp_path):
    parts = ({"mode": "block", "weight": 40}, {"mode": "full", "weight": 60})
    path = mixture(tmp_path / "data", *parts, draw="sampling", size=20)
    trainer = make_trainer(tmp_path, train_data=None, mixture=path)
    assert modes(trainer) == [(2, False)] * 12 + [(3, True)] * 8


def test_modes_and_options_must_agree(tmp_path):
    path = mixture(tmp_path / "data", {"mode": "full"}, {"mode": "full"})
    write_run(tmp_path)
    with pytest.raises(ValueError, match="it should be 0"):
        make_trainer(tmp_path, train_data=None, mixture=path)
    with pytest.raises(ValueError, match="leave both_modes out"):
        make_trainer(tmp_path, train_data=None, mixture=path, both_modes=True)
    trainer = make_trainer(tmp_path, train_data=None, mixture=path, block_share=0.0)
    assert not trainer.files.info.layout.block
