"""What is published, and what is refused before it is."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hub.stand_in import TOKEN, running_hub
from hub.support import FACTS, write_results
from rich.console import Console
from training.runs import make_trainer, write_run

from blocktune.check import Check
from blocktune.data import load_examples, write_jsonl
from blocktune.evaluation.runner import run_suite
from blocktune.evaluation.suite import parse_suite
from blocktune.hub import prepare, send, show


def test_a_dry_run_shows_every_file_and_the_card(run, results, tmp_path):
    files = prepare(run / "out", "me/mine", replace(FACTS, results=results))
    console = Console(record=True, width=200, file=(tmp_path / "shown").open("w"))
    show("me/mine", files, console)
    shown = console.export_text()
    assert set(files) == {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "blocktune.json",
        "chat_template.jinja",
        "links.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert all(name in shown for name in files)
    assert files["README.md"].decode() in re.sub(r" +\n", "\n", shown)
    sent = b"".join(s if isinstance(s, bytes) else s.read_bytes() for s in files.values())
    assert str(run).encode() not in sent, "a path of this machine would be published"


def test_the_card_says_what_it_must(run, results):
    facts = replace(FACTS, results=results, datasets=("org/data",))
    card = prepare(run / "out", "me/mine", facts)["README.md"].decode()
    head = card.split("---\n")[1]
    for line in ("base_model: org/base", "license: apache-2.0", "- org/data", "- kvlink"):
        assert line in head
    assert "| kvlink | 600 | 60.0 (56.0 to 64.0) | 70.0 (65.0 to 75.0) | 97.0 | - | - |" in card
    assert "| full-prefill | 600 | 61.5 (58.0 to 65.0) | 64.0 | - | - | - |" in card
    assert "| other |" not in card
    assert "other adapters: other, mean." in card
    assert "Made by `blocktune eval --suite s.yaml`, at commit `0123456789ab`." in card
    assert 'Engine.from_pretrained(adapter="me/mine")' in card
    assert "  seed: 42\n" in card
    assert "| split = dense mask |" in card
    assert "Not evaluated." in prepare(run / "out", "me/mine", FACTS)["README.md"].decode()


def test_the_card_names_the_data_set_that_a_local_file_was_made_of(tmp_path):
    write_run(tmp_path)
    named = {"data_sets": {"mandarjoshi/trivia_qa": "as its authors say"}}
    examples = [replace(one, meta=named) for one in load_examples(tmp_path / "train.jsonl")]
    write_jsonl(tmp_path / "train.jsonl", examples)
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.save_model()
    card = prepare(tmp_path / "out", "me/mine", FACTS)["README.md"].decode()
    assert "datasets:\n- mandarjoshi/trivia_qa\n" in card
    assert "    mandarjoshi/trivia_qa: as its authors say\n" in card


def test_a_token_that_may_not_write_is_one_line(monkeypatch):
    card = b"---\nlicense: mit\nbase_model: org/base\n---\n"
    files = {"README.md": card}
    with running_hub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_other")
        with pytest.raises(ValueError, match="the Hub refused 'me/mine': ") as caught:
            send("me/mine", files)
        assert hub.repos == {}
        send("me/mine", files, token=TOKEN)
        assert set(hub.files("me/mine")) == {"README.md"}
    assert "\n" not in str(caught.value)
    assert "set HF_TOKEN" in str(caught.value)


def test_a_connection_that_ends_without_words_is_one_line(monkeypatch):
    def create_repo(*_, **__):
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", create_repo)
    with pytest.raises(ValueError, match="the Hub refused 'me/mine': ConnectionError; log in"):
        send("me/mine", {})


def test_a_failing_check_stops_the_push(run, monkeypatch):
    checks = [Check("split = dense mask", False, 0.5, 1e-4), Check("ratio 1", True, 0.0, 1e-4)]
    monkeypatch.setattr("blocktune.hub.push.check_adapter", lambda *_, **__: checks)
    with pytest.raises(ValueError, match="is not pushed: 1 of 2 checks fail") as caught:
        prepare(run / "out", "me/mine", FACTS)
    assert "'split = dense mask' (5.0e-01, tolerance 1.0e-04)" in str(caught.value)


@pytest.mark.parametrize(
    ("facts", "repo", "line"),
    [
        (replace(FACTS, base_model=None), "me/mine", "which nobody else can load"),
        (replace(FACTS, base_model="org/ba se"), "me/mine", "which nobody else can load"),
        (FACTS, "mine", "--repo must be USER/NAME, got 'mine'"),
        (FACTS, "me/mi ne", "--repo must be USER/NAME, got 'me/mi ne'"),
        (replace(FACTS, license=None), "me/mine", "the licence of 'org/base' is not known"),
        (replace(FACTS, results=Path("none.json")), "me/mine", "no results at 'none.json'"),
    ],
)
def test_what_is_missing_is_named_in_one_line(run, facts, repo, line):
    with pytest.raises(ValueError, match=line) as caught:
        prepare(run / "out", repo, facts)
    assert "\n" not in str(caught.value)


def test_a_damaged_configuration_is_one_line(adapter):
    (adapter / "adapter_config.json").write_text("[1]")
    with pytest.raises(ValueError, match=r"adapter_config\.json: must be a mapping"):
        prepare(adapter, "me/mine", FACTS)
    with pytest.raises(ValueError, match=r"nowhere is not .*: there is no such folder"):
        prepare(adapter / "nowhere", "me/mine", FACTS)


def test_pickled_weights_are_refused(adapter):
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"contains 'adapter_model\.bin', a pickle"):
        prepare(adapter, "me/mine", FACTS)


def test_a_checkpoint_of_a_run_is_refused(adapter):
    (adapter / "optimizer.pt").write_bytes(b"")
    with pytest.raises(
        ValueError, match=r"is a checkpoint .*; push the finished adapter"
    ) as caught:
        prepare(adapter, "me/mine", FACTS)
    assert f"'{adapter.parent}'" in str(caught.value)


def test_a_folder_without_weights_is_refused(adapter):
    for path in adapter.glob("*.safetensors"):
        path.unlink()
    with pytest.raises(ValueError, match="has no weights"):
        prepare(adapter, "me/mine", FACTS)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"base_fingerprint": "a-b-c"}, "is of another base"),
        ({"adapter_fingerprints": {"out": "1" * 16}}, r"measures no method .* but kvlink, other"),
        ({"adapter_fingerprints": {}}, "measures no method with the adapter"),
    ],
)
def test_results_of_other_weights_are_refused(run, tmp_path, changes, line):
    path = write_results(tmp_path / "results.json", run / "out", **changes)
    with pytest.raises(ValueError, match=line) as caught:
        prepare(run / "out", "me/mine", replace(FACTS, results=path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("record", "line"),
    [
        ({"methods": {"naive": {"em": 1.0}}}, r"not a results\.json of `blocktune eval`"),
        ({"methods": {"naive": 1}}, r"not a results\.json of `blocktune eval`"),
        ({"methods": {}, "provenance": None}, "does not name the weights it measured"),
        (
            {"methods": {"a": {"n": 1, "em": 0, "ci95": [0, 0], "adapter": None}}},
            "does not name the weights it measured",
        ),
    ],
)
def test_results_that_tell_too_little_are_refused(run, tmp_path, record, line):
    path = tmp_path / "results.json"
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=line):
        prepare(run / "out", "me/mine", replace(FACTS, results=path))


def test_what_eval_writes_is_taken(run, tmp_path):
    tasks = [{"name": "w", "source": f"{run / 'train.jsonl'}", "max_new_tokens": 2, "limit": 3}]
    tuned = {"name": "kvlink", "adapter": str(run / "out")}
    suite = {"model": str(run / "base"), "methods": ["full-prefill", tuned], "tasks": tasks}
    suite |= {"ttft": {"num": 0}, "device": "cpu"}
    tasks[0]["metric"] = "rouge_l"
    run_suite(parse_suite(suite), tmp_path)
    facts = replace(FACTS, results=tmp_path / "results.json")
    card = prepare(run / "out", "me/mine", facts)["README.md"].decode()
    assert "| method | n | ROUGE-L | EM | F1 |" in card
    assert re.search(r"\| kvlink \| 3 \| [\d.]+ \([\d.]+ to [\d.]+\) \|", card)
