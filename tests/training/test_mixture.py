"""A run on a mixture: each source in the mode that the mixture says, named in the adapter."""

import json

import pytest
import yaml
from training.runs import make_trainer, write_run
from training.toy import toy_examples

from blocktune.data.example import write_jsonl
from blocktune.training.plan import make_plan
from blocktune.training.run import build, parse


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
    assert trainer.files.info.training["modes"] == {"block": 6, "full": 8}
    trainer.train()


def test_other_modes_are_other_data(tmp_path):
    """A run is not continued on them, see `resume`."""
    digests = []
    for pair in (("block", "full"), ("full", "block")):
        path = mixture(tmp_path / "data", *({"mode": mode} for mode in pair))
        trainer = make_trainer(tmp_path, train_data=None, mixture=path, max_steps=1)
        digests.append(trainer.prepared.digest)
    assert digests[0] != digests[1]


def test_kvlinks_shares_by_sampling(tmp_path):
    parts = ({"mode": "block", "weight": 40}, {"mode": "full", "weight": 60})
    path = mixture(tmp_path / "data", *parts, draw="sampling", size=20)
    trainer = make_trainer(tmp_path, train_data=None, mixture=path)
    assert modes(trainer) == [(2, False)] * 12 + [(3, True)] * 8


def test_a_part_is_worded_in_its_own_way_and_for_the_teacher_too(tmp_path):
    plain = {"instruction": "", "question": "{question}"}
    path = mixture(tmp_path / "data", {"mode": "block"}, {"mode": "full", "format": plain})
    options = {"train_data": None, "mixture": path, "block_tag": "[B]", "full_tag": "[F]"}
    trainer = make_trainer(tmp_path, distill_weight=0.5, max_steps=1, **options)
    decode = trainer.processing_class.decode
    parts = [part for record in trainer.train_dataset for part in record["parts"]]
    opened = {part["block"]: decode(part["prefix"]) for part in parts}
    taught = {part["block"]: decode(part["teacher_prefix"]) for part in parts}
    asked = {part["block"]: decode(part["query"]) for part in parts}
    assert "[B] Answer the question" in opened[True]
    assert "[F]" in opened[False]
    assert "Answer" not in opened[False] + taught[False]
    assert "Answer the question" in taught[True]
    assert "[" not in taught[True] + taught[False]
    assert "Question:" in asked[True]
    assert "Question:" not in asked[False]
    trainer.train()


def test_conversations_are_turns_where_the_mixture_says_so(tmp_path):
    turns = [("user", "Who?"), ("assistant", "Anna."), ("user", "Where?"), ("assistant", "Here.")]
    record = {"messages": [{"role": role, "content": text} for role, text in turns]}
    source = tmp_path / "chat.jsonl"
    source.write_text(json.dumps(record))
    path = tmp_path / "mixture.yaml"
    part = {"source": str(source), "mode": "both", "turns": True}
    path.write_text(yaml.safe_dump({"parts": [part]}))
    options = {"distill_weight": 0.5, "distill_states": "kv", "max_steps": 1, "full_tag": "[F]"}
    trainer = make_trainer(tmp_path, train_data=None, mixture=str(path), **options)
    parts = [part for record in trainer.train_dataset for part in record["parts"]]
    block, full = sorted(parts, key=lambda part: not part["block"])
    decode = trainer.processing_class.decode
    assert len(block["chunks"]) == 1
    assert (full["chunks"], full["query"]) == ([], [])
    assert decode(full["prefix"]).index("[F] Who?") < decode(full["prefix"]).index("Where?")
    assert "Question" not in decode(full["prefix"])
    assert (
        full["teacher_prefix"]
        == trainer.processing_class(
            decode(full["prefix"]).replace("[F] ", ""), add_special_tokens=False
        )["input_ids"]
    )
    trainer.train()
    path.write_text(yaml.safe_dump({"parts": [part | {"mode": "block"}]}))
    with pytest.raises(ValueError, match="'turns'"):
        make_trainer(tmp_path, train_data=None, mixture=str(path))


def test_a_parts_wording_is_strict(tmp_path):
    for wrong, message in (
        ({"instructions": ""}, "prompt format: unknown key 'instructions'"),
        ({"question": "x"}, "must hold {question}"),
    ):
        path = mixture(tmp_path / "data", {"format": wrong}, {})
        with pytest.raises(ValueError, match=rf"parts\[0\]: .*{message}"):
            make_trainer(tmp_path, train_data=None, mixture=path)


def test_modes_and_options_must_agree(tmp_path):
    path = mixture(tmp_path / "data", {"mode": "full"}, {"mode": "full"})
    write_run(tmp_path)
    with pytest.raises(ValueError, match="set block_share: 0"):
        make_trainer(tmp_path, train_data=None, mixture=path)
    with pytest.raises(ValueError, match="leave both_modes out"):
        make_trainer(tmp_path, train_data=None, mixture=path, both_modes=True)
    with pytest.raises(ValueError, match="leave block_share out"):
        make_trainer(tmp_path, train_data=None, mixture=path, block_share=0.5)
    trainer = make_trainer(tmp_path, train_data=None, mixture=path, block_share=0.0)
    assert not trainer.files.info.layout.block


def test_the_plan_counts_modes_as_they_are(tmp_path):
    path = mixture(tmp_path / "data", {"mode": "block"}, {"mode": "full"})
    data = {"train_data": None, "mixture": path}
    trainer = build(*parse(["--config", str(write_run(tmp_path, **data))]))
    assert make_plan(trainer)["layout"].startswith("block 60%")


def test_nothing_is_trained_on_what_it_is_judged_by(tmp_path, monkeypatch):
    """Sources of the Hub are read from ``train``, by themselves and in a mixture."""
    asked = []

    def load(source, split=None, **options):
        asked.append((source, split))
        return toy_examples(2)

    monkeypatch.setattr("blocktune.training.run.load_examples", load)
    monkeypatch.setattr("blocktune.data.mixture.load_examples", load)
    evaluated = {"eval_data": "hotpotqa", "eval_strategy": "epoch"}
    make_trainer(tmp_path, train_data="hotpotqa", **evaluated)
    path = tmp_path / "mixture.yaml"
    parts = [{"source": "hf:a/b"}, {"source": "hf:a/b?split=dev"}, {"source": "nq", "split": "x"}]
    path.write_text(yaml.safe_dump({"parts": parts}))
    make_trainer(tmp_path, train_data=None, mixture=str(path))
    assert asked == [
        ("hotpotqa", "train"), ("hotpotqa", None),
        ("hf:a/b", "train"), ("hf:a/b?split=dev", None), ("nq", "x"),
    ]  # fmt: skip
