"""The sweep over model classes: a dozen here, all of them by `blocktune check --families`."""

import json

import pytest
from typer.testing import CliRunner

from blocktune.check import families
from blocktune.check.families import check_families, check_family, model_types
from blocktune.commands import app

EXACT = ("llama", "cohere2", "gpt_neox", "stablelm", "nemotron", "gpt_oss", "afmoe", "deepseek_v3")
EXACT += ("dbrx", "phi4_multimodal", "cohere_compass_text")
LIMITED = ("ministral3", "llama4_text")
REFUSED = {
    "gpt2": "no rotary",
    "musicgen": "no rotary",
    "qwen3_next": "'linear_attention' in layer 0",
    "lfm2_moe": "'conv' in layer 0",
    "xlstm": "a recurrence in layer 0",
    "bloom": "computes attention in its own code",
    "codegen": "computes attention in its own code",
    "reformer": "computes attention in its own code",
    "blt": "is not one stack of layers over tokens",
    "gemma3n": "15 layers (first: 20) have no keys of their own",
    "gemma4_assistant": "30 layers (first: 0) have no keys of their own",
    "doge": "handles its attention mask or its cache in its own code",
}


@pytest.mark.parametrize("name", EXACT)
def test_exact_classes(name):
    found = check_family(name)
    assert found.verdict == "exact", found
    assert found.full < 1e-5
    assert found.block < 1e-5


@pytest.mark.parametrize("name", LIMITED)
def test_classes_that_are_exact_up_to_a_length(name):
    found = check_family(name)
    assert found.verdict == "exact up to a length", found
    assert found.max_tokens > 1000


@pytest.mark.parametrize("name", REFUSED)
def test_refused_classes(name):
    found = check_family(name)
    assert found.verdict == "refused"
    assert REFUSED[name] in found.note
    assert "use a " in found.note


def test_a_wrong_rotation_is_found(monkeypatch):
    monkeypatch.setattr(
        "blocktune.engine.assemble.rotate_keys", lambda keys, rotation, out: out.copy_(keys)
    )
    found = check_family("llama")
    assert found.verdict == "wrong"
    assert found.block > 1e-3


def test_a_class_that_kills_its_process_is_one_row(monkeypatch):
    monkeypatch.setattr(families, "check_family", lambda name: __import__("os")._exit(7))
    [found] = check_families(["llama"])
    assert (found.verdict, found.name) == ("wrong", "LlamaForCausalLM")
    assert "exit code 7" in found.note


def test_the_command_prints_a_row_for_each_class():
    command = ["check", "--families", "--only", "llama", "--only", "gpt2", "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)["families"]
    assert [one["verdict"] for one in found] == ["exact", "refused"]


def test_an_unknown_model_type_names_near_ones():
    with pytest.raises(ValueError, match="language model of type 'lama'"):
        model_types(["lama"])
