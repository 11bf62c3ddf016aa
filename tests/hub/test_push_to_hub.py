"""`push_to_hub` of a training run: refused before it, done after it, never by the Trainer."""

import pytest
from training.runs import write_run

from blocktune.adapter import INFO_FILE
from blocktune.hub import Publisher
from blocktune.training.run import train

PUSH = {"push_to_hub": True, "hub_model_id": "me/mine", "max_steps": 1, "hub_private_repo": True}


class Recorder:
    """A publisher that only says what it was asked."""

    def __init__(self):
        self.calls = []

    def check(self, repo, base_model):
        self.calls.append(("check", repo, base_model))

    def publish(self, folder, repo, private):
        self.calls.append(("publish", repo, private, (folder / INFO_FILE).is_file()))


def test_a_run_is_published_when_it_is_saved(tmp_path):
    recorder = Recorder()
    path = write_run(tmp_path, **PUSH, save_strategy="steps", save_steps=1)
    train(["--config", str(path)], publisher=recorder)
    base = str(tmp_path / "base")
    assert recorder.calls == [("check", "me/mine", base), ("publish", "me/mine", True, True)]


def test_a_dry_run_publishes_nothing(tmp_path):
    recorder = Recorder()
    train(["--config", str(write_run(tmp_path, **PUSH, dry_run=True))], publisher=recorder)
    assert [call[0] for call in recorder.calls] == ["check"]


@pytest.mark.parametrize(
    ("changes", "publisher", "line"),
    [
        ({}, Publisher(), "which nobody else can load"),
        ({"hub_model_id": "mine"}, Publisher(), "--repo must be USER/NAME"),
        ({"hub_model_id": None}, Publisher(), "push_to_hub needs hub_model_id: USER/NAME"),
        ({}, None, "and a program that publishes"),
    ],
)
def test_what_cannot_be_published_is_refused_before_training(tmp_path, changes, publisher, line):
    path = write_run(tmp_path, **PUSH | changes)
    with pytest.raises(ValueError, match=line):
        train(["--config", str(path)], publisher=publisher)
    assert not (tmp_path / "out").exists()
