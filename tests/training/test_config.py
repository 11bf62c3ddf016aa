"""What a YAML may say, and the one line that answers what it may not."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from training.runs import make_trainer, write_run

from blocktune.training.run import parse

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


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        ({"attention_excution": "split"}, "did you mean 'attention_execution'?"),
        ({"attention_execution": "fast"}, "attention_execution must be one of split, flex, dense"),
        ({"attention_execution": "flex"}, "no backward on a CPU"),
        ({"num_links": "many"}, "--num-links: invalid int value: 'many'"),
        ({"num_links": -1}, "layout 'num_links' must be an integer of at least 0"),
        ({"block_share": 1.5}, "block_share must be in [0, 1], got 1.5"),
        ({"packing": True}, "block training needs packing: False, got True"),
        ({"padding_free": True}, "block training needs padding_free: False"),
        ({"use_liger_kernel": True}, "block training needs use_liger_kernel: False"),
        ({"freeze_base": True}, "freeze_base trains the learned tokens alone"),
        ({"packing": True}, "pack_length packs by layout"),
        ({"both_modes": True, "block_share": 0.5}, "leave block_share out"),
        ({"num_links": 1, "block_share": 0.0}, "stand in block examples, and there are none"),
        ({"num_links": 1, "link_table": "chunk"}, "needs max_chunks"),
        ({"block_dropout": 0.1, "shared_prefix": True}, "drop it or shared_prefix"),
        ({"position_jitter": 3, "placement": "parallel"}, "puts them in one place"),
        ({"distill_states": "all"}, "distill_states must be none, hidden, kv"),
        ({"mixture": "mix.yaml"}, "a mixture names its own sources"),
        ({"titled": "{title}"}, "format 'titled' must hold {text} and {title}"),
        ({"train_data": ""}, "train_data is missing"),
    ],
)
def test_what_a_run_may_not_say(tmp_path, overrides, line):
    with pytest.raises(ValueError, match=re.escape(line)):
        parsed(tmp_path, **overrides)


def test_flash_attention_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'flash_attention_2' knows no chunks; leave it out"):
        make_trainer(tmp_path, attn_implementation="flash_attention_2")


def test_an_unknown_base_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot load base model .*nowhere"):
        make_trainer(tmp_path, model_name_or_path=str(tmp_path / "nowhere"))


def test_a_bad_key_is_one_line_and_exit_code_2(tmp_path):
    path = write_run(tmp_path, num_lnks=3)
    command = [sys.executable, str(ROOT / "recipes/train.py"), "--config", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2
    assert (
        done.stderr.strip().splitlines()[-1].startswith("error: unknown key or option 'num_lnks'")
    )
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.name)
def test_recipes_parse_and_open_with_their_command(path):
    first = path.read_text().splitlines()[0]
    assert f"recipes/train.py --config recipes/{path.name}" in first
    data, args, model = parse(["--config", str(path)])
    assert set(yaml.safe_load(path.read_text())) <= {*vars(data), *vars(args), *vars(model)}
