"""`push_to_hub` of a training run: refused before it, done after it, never by the Trainer."""

import pytest
from training.runs import write_run
from transformers.integrations import deepspeed

from blocktune.adapter import INFO_FILE, AdapterInfo
from blocktune.hub import Publisher
from blocktune.training.run import train

PUSH = {"push_to_hub": True, "hub_model_id": "me/mine", "max_steps": 1, "hub_private_repo": True}
SECRET = "hf_" + "aB3" * 11


class Recorder:
    """A publisher that only says what it was asked."""

    def __init__(self):
        self.calls = []

    def check(self, repo, base_model, layout, token):
        self.calls.append(("check", repo, base_model, layout.num_links, token))

    def publish(self, folder, repo, private, token):
        self.calls.append(("publish", repo, private, token, (folder / INFO_FILE).is_file()))


def test_a_run_is_published_when_it_is_saved(tmp_path):
    recorder = Recorder()
    path = write_run(tmp_path, **PUSH, num_links=2, save_strategy="steps", save_steps=1)
    train(["--config", str(path), "--hub_token", SECRET], publisher=recorder)
    base = str(tmp_path / "base")
    assert recorder.calls == [
        ("check", "me/mine", base, 2, SECRET),
        ("publish", "me/mine", True, SECRET, True),
    ]


def test_a_dry_run_publishes_nothing(tmp_path):
    recorder = Recorder()
    train(["--config", str(write_run(tmp_path, **PUSH, dry_run=True))], publisher=recorder)
    assert [call[0] for call in recorder.calls] == ["check"]


@pytest.mark.parametrize(
    ("changes", "publisher", "line"),
    [
        ({}, Publisher(), "which nobody else can load"),
        ({"hub_model_id": "mine"}, Publisher(), "hub_model_id must be USER/NAME"),
        ({"num_links": 1, "num_headers": 1}, Publisher(), "no method serves an adapter with link"),
        ({"hub_model_id": None}, Publisher(), "push_to_hub needs hub_model_id: USER/NAME"),
        ({}, None, "and `blocktune train`"),
        (
            {"hub_strategy": "checkpoint"},
            Recorder(),
            "needs hub_strategy: every_save, got .*checkpoint",
        ),
        ({"hub_revision": "dev"}, Recorder(), "needs hub_revision: None, got 'dev'"),
        ({"hub_always_push": True}, Recorder(), "needs hub_always_push: False, got True"),
    ],
)
def test_what_cannot_be_published_is_refused_before_training(tmp_path, changes, publisher, line):
    path = write_run(tmp_path, **PUSH | changes)
    with pytest.raises(ValueError, match=line):
        train(["--config", str(path)], publisher=publisher)
    assert not (tmp_path / "out").exists()


def test_the_token_of_the_command_line_is_nowhere_in_the_adapter(tmp_path, monkeypatch):
    options = ["--config", str(write_run(tmp_path, **PUSH)), "--hub_token", SECRET]
    monkeypatch.setattr("sys.argv", ["blocktune", "train", *options])
    folder = train(options, publisher=Recorder())
    texts = [p for p in folder.iterdir() if p.is_file() and p.suffix != ".bin"]  # stays at home
    assert not [path.name for path in texts if SECRET.encode() in path.read_bytes()]
    assert "--hub_token HIDDEN" in AdapterInfo.load(folder).training["command"]


class ZeRO3:
    """What transformers asks of DeepSpeed's settings."""

    def is_zero3(self):
        return True


def test_deepspeed_is_put_aside_while_publishing(monkeypatch, tmp_path):
    seen, settings = [], ZeRO3()

    def prepare(*args, **kwargs):
        seen.append(deepspeed.is_deepspeed_zero3_enabled())
        raise ValueError("is not pushed")

    monkeypatch.setattr("blocktune.hub.push.prepare", prepare)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", None)
    deepspeed.set_hf_deepspeed_config(settings)
    with pytest.raises(ValueError, match="is not pushed"):
        Publisher().publish(tmp_path, "me/mine", False, None)
    assert seen == [False]
    assert deepspeed.is_deepspeed_zero3_enabled()
