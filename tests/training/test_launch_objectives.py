"""Teacher and fresh rows over processes: a second forward, and one that may stop halfway."""

import pytest
from training.test_launch import LAUNCHES, launch

pytestmark = pytest.mark.alone

OBJECTIVE = {
    "distill_weight": 0.5,
    "distill_top_k": 8,
    "distill_states": "kv",
    "recompute": "deviation",
    "recompute_min": 0.0,
    "recompute_max": 0.5,
}


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return launch("single", tmp_path_factory.mktemp("single"), **OBJECTIVE)[0]


@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "fsdp2"])
def test_two_processes_match_one(name, alone, tmp_path):
    losses, info = launch(name, tmp_path, **OBJECTIVE)
    assert (info.training["world_size"], info.training["launch"]) == LAUNCHES[name]
    assert losses == pytest.approx(alone, abs=1e-3)
