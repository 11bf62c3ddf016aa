"""Training memory grows with the prompt's length, not with its square."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

MEASURE = Path(__file__).with_name("memory_of_training.py")
TOKENS = (4096, 8192, 16_384)
AT_ONCE = {"MALLOC_ARENA_MAX": "1"} | dict.fromkeys(
    ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536"
)
"""glibc gives back what is freed at once: else the peak differs by a quarter from run to run."""


def measured(tokens, execution="split", count="rss"):
    """Peak memory above the baseline (bytes), or elements of the largest tensor."""
    command = [sys.executable, str(MEASURE), str(tokens), execution, count]
    env = os.environ | AT_ONCE
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.alone
def test_peak_memory_of_training_grows_linearly():
    """16,384 tokens in 32 chunks, forward and backward, on the shipped tiny model's shape.

    With 64 query rows: what many fresh rows take is in attention/test_masks.py.

    Linear growth from 4,096 is a factor of 4. The query's mask (rows x N, with rows fixed) and
    the keys are linear too; 4.6 leaves room for them and for the allocator. With a dense mask the
    factor is above 8 (a test of its own, below, in elements).
    """
    peak = {tokens: measured(tokens) for tokens in TOKENS}
    assert peak[4096] > 50e6, "nothing was measured: the baseline ate the training step"
    assert peak[8192] / peak[4096] < 2.3, peak
    assert peak[16_384] / peak[4096] < 4.6, peak


@pytest.mark.alone
def test_training_makes_no_tensor_of_rows_by_rows():
    tokens = 16_384
    assert measured(tokens, count="numel") < tokens * tokens // 8
    # The measure itself notices: the oracle makes one, at a length that it can afford.
    assert measured(2048, "dense", "numel") >= 2048 * 2048
