"""Two processes give the rows of one, also when one run is continued by the other kind."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from tiny_tokenizer import build_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

from blocktune.evaluation.__main__ import main
from blocktune.evaluation.processes import Processes, launched


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("suite")
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=1024,
        initializer_range=0.2,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    source = "worlds:test?seed=1&n=7&passages=2&kinds=self-contained"
    record = {
        "model": str(folder / "model"),
        "methods": ["full-prefill", "naive", "cacheblend"],
        "tasks": [{"name": "worlds", "source": source, "max_new_tokens": 4}],
        "batch_size": 2,
        "dtype": "float32",
        "ttft": {"num": 0},
    }
    (folder / "suite.yaml").write_text(yaml.safe_dump(record))
    return folder / "suite.yaml"


def rows_of(output) -> dict[str, str]:
    return {path.name: path.read_text() for path in sorted((output / "rows").iterdir())}


def test_batches_are_dealt_out_in_turn():
    batches = list(range(7))
    shares = [Processes(rank, 3).share(batches) for rank in range(3)]
    assert shares == [[0, 3, 6], [1, 4], [2, 5]]
    assert [Processes(rank).is_main for rank in (0, 1)] == [True, False]


def test_one_process_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert (launched().rank, launched().count, launched().device) == (0, 1, None)


@pytest.mark.parametrize(
    ("gpus", "local", "device", "on_cpu"),
    [(2, 2, "cuda:1", False), (2, 4, "cuda:1", True), (1, 4, "cuda:0", True), (0, 4, "cpu", True)],
)
def test_more_processes_than_gpus_take_turns_on_them(monkeypatch, gpus, local, device, on_cpu):
    """Such processes cannot meet by NCCL, which wants a GPU for each: they meet on the CPU."""
    asked = []

    def state(cpu, timeout):
        asked.append(cpu)
        return SimpleNamespace(
            local_process_index=3 if local > 2 else 1,
            process_index=3,
            num_processes=local,
            wait_for_everyone="of accelerate",
            destroy_process_group=lambda: None,
        )

    monkeypatch.setattr("accelerate.PartialState", state)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setenv("WORLD_SIZE", str(local))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    found = launched()
    assert found.device == device
    assert found.wait == (torch.distributed.barrier if on_cpu else "of accelerate")
    assert asked == [on_cpu]


def test_mistakes_end_with_2_and_one_line(tmp_path, capsys):
    given = ["--suite", str(tmp_path / "none.yaml"), "--output", str(tmp_path)]
    assert main(given) == 2
    assert capsys.readouterr().err.count("\n") == 1


def start(output, suite, *launcher) -> None:
    command = [*launcher, "-m", "blocktune.evaluation", "--suite", suite, "--output", output]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.alone
def test_two_processes_give_the_rows_of_one(suite, tmp_path):
    """By torchrun: on CPUs `accelerate launch` starts one process, whatever it is asked for."""
    start(tmp_path / "one", suite)
    start(tmp_path / "two", suite, "-m", "torch.distributed.run", "--nproc_per_node", 2)
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert one["methods"] == two["methods"]
    assert [run["provenance"]["processes"] for run in (one, two)] == [1, 2]
