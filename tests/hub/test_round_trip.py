"""Pushed and loaded back by the command line, against a local stand-in for the Hub."""

import json
import re
import shlex
from dataclasses import replace

import pytest
from hub.stand_in import TOKEN, running_hub
from hub.support import online, put_base
from training.runs import write_run
from typer.testing import CliRunner

from blocktune.adapter import OWN_WEIGHTS, AdapterInfo
from blocktune.commands import app
from blocktune.data import RagExample
from blocktune.engine import Engine
from blocktune.hub import CardFacts, prepare
from blocktune.hub.push import verify_base
from blocktune.prompt import Chunk


def blocktune(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def test_a_run_pushes_itself_and_its_card_works(tmp_path, monkeypatch, capsys):
    """Of an adapter whose method has parameters: they stand quoted in the card's command."""
    markers = {"num_headers": 1, "num_trailers": 1, "placement": "composite"}
    push = {"push_to_hub": True, "hub_model_id": "me/mine", "model_name_or_path": "org/base"}
    config = write_run(tmp_path, **markers, **push, max_steps=1)
    with running_hub() as hub:
        put_base(hub, tmp_path)
        with online(hub, tmp_path / "home"):
            monkeypatch.setenv("HF_TOKEN", "hf_other")
            done = blocktune("train", "--config", config, "--hub_token", TOKEN)
        assert done.exit_code == 0, done.output
        revision = hub.repos["me/mine"].commits[-1][0]
        assert f"pushed to {hub.url}/me/mine, commit {revision}" in done.stdout
        files = hub.files("me/mine")
        assert [name for name in files if TOKEN.encode() in files[name]] == []
        card = files["README.md"].decode()
        assert "license: mit" in card

        snippet = re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]
        typed = re.search(r"```bash\n(blocktune .*?)```", card, re.DOTALL)[1]
        words = shlex.split(typed.replace("\\\n", " "))[1:]
        with online(hub, tmp_path / "elsewhere"):
            capsys.readouterr()
            exec(compile(snippet, "card", "exec"), {})
            came = capsys.readouterr().out
            told = blocktune(*words, "--json")
        assert told.exit_code == 0, told.output
        assert hub.unknown == []
    here = Engine.from_pretrained(str(tmp_path / "base"), tmp_path / "out")
    chunks = (Chunk("Anna was born in Kirby."), Chunk("Kirby is a harbour."))
    example = RagExample("Where was Anna born?", chunks)
    [answer] = here.answer([example], "turborag positions=composite")
    assert came.strip() == answer.text.strip()
    assert json.loads(told.stdout)["answer"] == answer.text


def test_a_base_that_is_none_or_another_is_refused(run, tmp_path):
    config = json.loads((run / "base/config.json").read_text())
    with running_hub() as hub, online(hub, tmp_path):
        hub.put("org/other", {"config.json": json.dumps(config | {"vocab_size": 7}).encode()})
        info = AdapterInfo.load(run / "out")
        with pytest.raises(ValueError, match="the Hub has no model 'org/none'"):
            verify_base("org/none", info)
        with pytest.raises(ValueError, match="'org/other' has another architecture"):
            prepare(run / "out", "me/mine", CardFacts("org/other", "mit"))
        verify_base("org/other", replace(info, base_model=OWN_WEIGHTS))


def test_what_was_pushed_comes_back(run, tmp_path):
    passage = "Anna lives in Elm."
    question = ("--question", "Where does Anna live?", "--chunk", passage)
    push = ["push", run / "out", "--repo", "me/mine", "--base-model", "org/base"]
    push += ["--model", run / "base"]
    with running_hub() as hub, online(hub, tmp_path):
        put_base(hub, run)
        shown = blocktune(*push, "--dry-run")
        assert shown.exit_code == 0, shown.output
        assert set(hub.repos) == {"org/base"}, "a dry run sends nothing"
        assert "me/mine: 8 files, nothing sent" in shown.stdout
        for line in ("links.safetensors", "license: mit", "base_model: org/base", "## Use"):
            assert line in shown.stdout

        hub.put("me/mine", {"adapter_model.bin.safetensors": b"old", "notes.txt": b"kept"})
        pushed = blocktune(*push)
        assert pushed.exit_code == 0, pushed.output
        files = hub.files("me/mine")
        assert files["links.safetensors"] == (run / "out/links.safetensors").read_bytes()
        assert files["notes.txt"] == b"kept"
        assert "adapter_model.bin.safetensors" not in files, "stale weights must go"
        assert b"license: mit" in files["README.md"]
        revision = hub.repos["me/mine"].commits[-1][0]
        assert f"--adapter me/mine@{revision}" in pushed.stdout

        hub.put("me/mine", {"blocktune.json": b"{}"})  # a later commit that cannot be loaded
        ask = ("answer", "--adapter", f"me/mine@{revision}", "--method", "kvlink", *question)
        came = blocktune(*ask, "--json")
        assert came.exit_code == 0, came.output
        assert hub.unknown == []
    here = Engine.from_pretrained(str(run / "base"), run / "out")
    [answer] = here.answer([RagExample(question[1], (Chunk(passage),))], "kvlink")
    assert json.loads(came.stdout)["answer"] == answer.text
