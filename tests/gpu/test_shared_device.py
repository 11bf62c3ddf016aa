"""Several processes of an evaluation share one device; on CPUs: evaluation/test_processes.py."""

import pytest
from evaluation.launches import rows_of, start, write_suite

pytestmark = pytest.mark.gpu


def test_two_processes_on_one_device_give_the_rows_of_one(tmp_path):
    """NCCL would refuse them, and so would a barrier that names a GPU for each."""
    suite = write_suite(tmp_path)
    start(tmp_path / "one", suite)
    start(tmp_path / "two", suite, processes=2)
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")
