"""What a YAML may say, and the one line that answers what it may not."""

import re
import runpy
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from training.runs import make_trainer, write_run
from trl import ModelConfig
from typer.testing import CliRunner

from blocktune.commands import app
from blocktune.training.config import BlockSFTConfig, DataArgs
from blocktune.training.plan import print_options
from blocktune.training.run import parse, train

ROOT = Path(__file__).resolve().parents[2]


def parsed(tmp_path, **overrides):
    return parse(["--config", str(write_run(tmp_path, **overrides))])


def test_yaml_values_reach_the_layout(tmp_path):
    data, args, model = parsed(tmp_path, num_links=3, link_side="before", learning_rate="2e-4")
    assert (args.layout.num_links, args.layout.link_side) == (3, "before")
    assert args.learning_rate == 2e-4
    assert model.lora_r == 4
    assert data.format.system is None


def test_the_command_line_overrides_the_yaml(tmp_path):
    path = write_run(tmp_path, num_links=3)
    args = parse(["--config", str(path), "--num_links", "1"])[1]
    assert args.num_links == 1
    for pinned in (["me/x@v1"], ["me/x", "--model_revision", "v1"]):
        model = parse(["--config", str(path), "--model_name_or_path", *pinned])[2]
        assert (model.model_name_or_path, model.model_revision) == ("me/x", "v1")


def test_a_source_that_is_typed_replaces_the_kind_that_the_yaml_names(tmp_path):
    path = str(write_run(tmp_path, train_limit=5))
    data = parse(["--config", path, "--mixture", "mix.yaml"])[0]
    assert (data.mixture, data.train_data, data.train_limit) == ("mix.yaml", "", None)
    path = str(write_run(tmp_path, train_data=None, mixture="mix.yaml"))
    data = parse(["--config", path, "--train-data=mine.jsonl"])[0]
    assert (data.mixture, data.train_data) == (None, "mine.jsonl")
    with pytest.raises(ValueError, match="a mixture has its own sources"):
        parse(["--config", path, "--train_data", "mine.jsonl", "--mixture", "mix.yaml"])


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"eval_data": "worlds:dev"}, "would never be used, since eval_strategy is 'no'"),
        ({"eval_limit": 4}, "eval_limit has no effect without eval_data"),
        ({"eval_strategy": "epoch"}, "name their source in eval_data"),
        ({"eval_on_start": True}, "name their source in eval_data"),
    ],
)
def test_an_evaluation_that_would_never_be(tmp_path, overrides, line):
    with pytest.raises(ValueError, match=line):
        train(["--config", str(write_run(tmp_path, **overrides))])


def test_every_key_is_listed_once_with_what_it_means():
    console = Console(width=200, record=True)
    print_options(console)
    text = console.export_text()
    keys = re.findall(r"^(\w+)  +\S", text, re.MULTILINE)
    known = {f.name for c in (DataArgs, BlockSFTConfig, ModelConfig) for f in fields(c) if f.init}
    assert sorted(key for key in keys if key != "key") == sorted(known)
    assert "Link tokens per chunk (KVLink)" in text
    for values in ("refuse, drop", "split, flex, dense", "random, group_by_length, sequential"):
        assert f"({values})" in text


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"attention_excution": "split"}, "did you mean 'attention_execution'?"),
        ({"attention_execution": "fast"}, "attention_execution: invalid choice: 'fast'"),
        ({"attention_execution": "flex"}, "no backward on a CPU"),
        ({"num_links": "many"}, "run.yaml: num_links: invalid int value: 'many'"),
        ({"num_links": -1}, "layout: 'num_links' must be a whole number, at least 0"),
        ({"save_steps": float("inf")}, "save_steps must be a number of at least 0, got inf"),
        ({"dataset_kwargs": "a"}, "dataset_kwargs: must be a mapping of keys to values, got 'a'"),
        ({"output_dir": ""}, "output_dir is empty; name a folder"),
        ({"block_share": 1.5}, "block_share must be a share in [0, 1], got 1.5"),
        ({"learning_rate": float("nan")}, "learning_rate must be a number of at least 0, got nan"),
        ({"max_grad_norm": float("inf")}, "max_grad_norm must be a number of at least 0, got inf"),
        ({"weight_decay": -1.0}, "weight_decay must be a number of at least 0, got -1.0"),
        ({"packing": True}, "block training needs packing: False, got True"),
        ({"padding_free": True}, "block training needs padding_free: False"),
        ({"use_liger_kernel": True}, "block training needs use_liger_kernel: False"),
        ({"freeze_base": True}, "freeze_base trains only the learned tokens"),
        ({"packing": True}, "pack_length packs by layout"),
        ({"both_modes": True, "block_share": 0.5}, "leave block_share out"),
        ({"num_links": 1, "block_share": 0.0}, "need block examples; raise block_share"),
        ({"num_links": 1, "link_table": "chunk"}, "needs max_chunks"),
        ({"num_links": 1, "num_trailers": 1}, "no method serves an adapter with link tokens and"),
        ({"block_dropout": 0.1, "shared_prefix": True}, "drop it or shared_prefix"),
        ({"position_jitter": 3, "placement": "parallel"}, "does not fit placement 'parallel'"),
        ({"distill_states": "all"}, "distill_states: invalid choice: 'all'"),
        ({"mixture": "mix.yaml"}, "a mixture has its own sources"),
        ({"help": True}, "unknown key or option 'help'"),
        ({"titled": "{title}"}, "format: 'titled' must hold {text} and {title}"),
        ({"block_tag": True}, "block_tag: must be text, got True; put it in quotes"),  # on
        ({"train_data": ""}, "train_data is missing"),
        (
            {"train_sampling_strategy": "batch_rebalance"},
            "must be one of random, group_by_length, seq",
        ),
        ({"max_length": 0}, "max_length must be at least 1, got 0"),
        ({"pack_length": 0}, "pack_length must be at least 1, got 0"),
        ({"model_name_or_path": None}, "model_name_or_path is missing"),
        ({"trust_remote_code": True}, "code of repositories is never run"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size must be at least 1"),
        ({"max_steps": -1, "num_train_epochs": 0}, "num_train_epochs must be above 0, got 0"),
        ({"activation_offloading": True}, "activation_offloading is for GPUs"),
        ({"fp16": True}, "fp16 is for GPUs"),  # torch would ignore it
    ],
)
def test_what_a_run_may_not_say(tmp_path, overrides, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        parsed(tmp_path, **overrides)


def test_flash_attention_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'flash_attention_2' does not support layouts"):
        make_trainer(tmp_path, attn_implementation="flash_attention_2")


@pytest.mark.parametrize(
    ("kind", "given", "line"),
    [
        ("warmup_stable_decay", None, "'warmup_stable_decay' .*: .*num_decay_steps"),
        ("cosine_with_min_lr", None, "min_lr"),
        ("linear", {"foo": 1}, r"'linear' .* lr_scheduler_kwargs {'foo': 1}: .*foo"),
    ],
)
def test_a_schedule_that_cannot_be_made_is_refused_before_the_run(tmp_path, kind, given, line):
    with pytest.raises(ValueError, match=line):
        make_trainer(tmp_path, lr_scheduler_type=kind, lr_scheduler_kwargs=given)
    kwargs = {"num_decay_steps": 2}
    make_trainer(tmp_path, lr_scheduler_type="warmup_stable_decay", lr_scheduler_kwargs=kwargs)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"dtype": "float31"}, "dtype: invalid choice: 'float31'"),
        (
            {"freeze_base": True, "use_peft": False, "num_links": 1, "load_in_4bit": True},
            "cannot train a quantized base without an adapter",
        ),
    ],
)
def test_what_no_base_can_be(tmp_path, overrides, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        make_trainer(tmp_path, **overrides)


def test_a_key_without_a_value_is_refused_where_it_needs_one(tmp_path):
    path = write_run(tmp_path)
    path.write_text(path.read_text() + "lora_alpha:\nmax_length:\n")
    with pytest.raises(ValueError, match=r"run.yaml: lora_alpha: must have a value; .* 32"):
        parse(["--config", str(path)])


def test_a_share_that_rounds_to_no_block_example_is_refused(tmp_path):
    path = write_run(tmp_path, block_share=0.001)
    with pytest.raises(ValueError, match=r"block_share 0\.001 of 64 examples leaves none in block"):
        train(["--config", str(path), "--dry-run"])


def test_an_unknown_base_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot load base model .*nowhere"):
        make_trainer(tmp_path, model_name_or_path=str(tmp_path / "nowhere"))


@pytest.fixture
def refused(monkeypatch, capsys):
    """Runs `recipes/train.py` in this process: the line with which it ends, with exit code 2."""

    def run(path) -> str:
        monkeypatch.setattr(sys, "argv", ["train.py", "--config", str(path)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "recipes/train.py"), run_name="__main__")
        assert stop.value.code == 2
        return capsys.readouterr().err.strip().splitlines()[-1]

    return run


def test_a_file_for_a_folder_is_one_line_and_exit_code_2(tmp_path, refused):
    path = write_run(tmp_path)
    (tmp_path / "out").write_text("not a folder")
    assert refused(path).startswith("error: ")


def test_a_missing_launcher_is_named():
    arguments = ["train", "--launcher", "nowhere.yaml", "--config", "recipes/kvlink.yaml"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    assert "no launcher configuration at 'nowhere.yaml'" in result.output


def test_another_machine_tells_its_own_error(tmp_path, refused, monkeypatch):
    """A file that is missing there alone would end the run without a reason."""
    monkeypatch.setenv("RANK", "8")
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert refused(tmp_path / "none.yaml").startswith("error: ")


def test_a_bad_key_is_one_line_and_exit_code_2(tmp_path, refused):
    line = refused(write_run(tmp_path, num_lnks=3))
    assert line.startswith("error: unknown key or option 'num_lnks'")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_parse_and_open_with_their_command(path):
    first = path.read_text().splitlines()[0]
    assert first == f"# blocktune train --config recipes/{path.name}"
    data, args, model = parse(["--config", str(path)])
    assert set(yaml.safe_load(path.read_text())) <= {*vars(data), *vars(args), *vars(model)}
