"""Two processes give the rows of one, also when one run is continued by the other kind."""

import json
from types import SimpleNamespace

import pytest
import torch
from evaluation.launches import rows_of, start, write_suite

from blocktune.evaluation.runner import Processes, launched


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    return write_suite(tmp_path_factory.mktemp("suite"))


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


def test_two_processes_give_the_rows_of_one(suite, tmp_path):
    start(tmp_path / "one", suite)
    start(tmp_path / "two", suite, processes=2)
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")
    one, two = (json.loads((tmp_path / n / "results.json").read_text()) for n in ("one", "two"))
    assert one["methods"] == two["methods"]
    assert [run["provenance"]["processes"] for run in (one, two)] == [1, 2]
