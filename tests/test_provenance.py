"""Where numbers and adapters come from, without this machine's folders."""

import subprocess
import sys

import pytest

from blocktune import provenance as module
from blocktune.provenance import commit, provenance, public, versions


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A repository of one commit that holds the module's file."""

    def git(*arguments):
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    (tmp_path / "provenance.py").write_text("")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "provenance.py"))
    git("init")
    return git


def test_a_commit_is_named_and_changes_are_told(checkout, tmp_path):
    assert commit() is None
    checkout("add", "provenance.py")
    checkout("commit", "-m", "one")
    assert commit() == checkout("rev-parse", "HEAD")
    (tmp_path / "untracked").write_text("")
    assert commit() == checkout("rev-parse", "HEAD")
    (tmp_path / "provenance.py").write_text("changed")
    assert commit() == checkout("rev-parse", "HEAD") + "+changes"


def test_another_checkout_is_not_ours(checkout, tmp_path):
    (tmp_path / "other").write_text("")
    checkout("add", "other")
    checkout("commit", "-m", "theirs")
    assert commit() is None


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["/home/me/bin/blocktune", "train", "--seed", "3"], "blocktune train --seed 3"),
        (["/home/me/blocktune/cli.py", "eval"], "blocktune eval"),
        (["/x/__main__.py"], "__main__.py"),
        (["/x/recipes/train.py", "--config", "a b.yaml"], "train.py --config 'a b.yaml'"),
    ],
)
def test_a_command_is_as_typed_without_the_folder_of_the_program(monkeypatch, argv, command):
    monkeypatch.setattr(sys, "argv", argv)
    assert provenance(7) | {"hardware": None} == {
        "command": command,
        "commit": commit(),
        "versions": versions(),
        "hardware": None,
        "seed": 7,
    }


def test_a_command_can_be_given():
    assert provenance(command=["python", "recipes/demo.py"])["command"] == "python recipes/demo.py"


SECRET = "hf_" + "aB3" * 11


@pytest.mark.parametrize(
    ("typed", "recorded"),
    [
        ("train --hub_token abc --seed 3", "train --hub_token HIDDEN --seed 3"),
        ("train --hub_token=abc --seed 3", "train --hub_token=HIDDEN --seed 3"),
        ("train --hub_token=a=b", "train --hub_token=HIDDEN"),
        ("train --hub-token abc", "train --hub-token HIDDEN"),
        ("train --push_to_hub_token abc", "train --push_to_hub_token HIDDEN"),
        ("train --use_auth_token --seed 3", "train --use_auth_token --seed 3"),
        (f"train --hub_tok {SECRET}", "train --hub_tok HIDDEN"),
        (f"train --hub_tok={SECRET}", "train --hub_tok=HIDDEN"),
        ("train --token", "train --token"),
        ("eval --store valkey://me:pw@host:6379/0", "eval --store valkey://HIDDEN@host:6379/0"),
        ("eval --store a/,remote=s3://b/c@d", None),
        ("answer --tokenizer M --adapter hf_models/mine", None),
    ],
)
def test_secrets_are_not_recorded(typed, recorded):
    assert provenance(command=typed.split())["command"] == (recorded or typed)


@pytest.mark.parametrize(
    ("recorded", "published"),
    [
        ("eval --suite /home/me/s.yaml --model out/m", "eval --suite s.yaml --model out/m"),
        ("eval --store file:///home/me/chunks", "eval --store chunks"),
        ("eval --store s3://bucket/a/b", "eval --store s3://bucket/a/b"),
    ],
)
def test_folders_of_this_machine_are_not_published(recorded, published):
    assert public({"command": recorded, "more": [recorded]}) == {
        "command": published,
        "more": [published],
    }


def test_versions_name_what_decides_numbers():
    assert {"python", "blocktune", "torch", "transformers", "peft", "trl"} <= versions().keys()
