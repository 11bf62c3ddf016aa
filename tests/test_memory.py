"""Training memory grows with the prompt's length, not with its square."""

import json
import os
import subprocess
import sys

import memory_of_training
from largest_tensor import LargestTensor

AT_ONCE = {"MALLOC_ARENA_MAX": "1"} | dict.fromkeys(
    ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "65536"
)
"""glibc gives back what is freed at once: else the peak differs by a quarter from run to run."""


def test_peak_memory_of_training_grows_linearly():
    """8,192 tokens in 32 chunks, forward and backward, on the shipped tiny model's shape.

    With 64 query rows: what many fresh rows take is in attention/test_masks.py.

    Linear growth from 2,048 is a factor of 4. The query's mask (rows x N, with rows fixed) and
    the keys are linear too; 4.6 leaves room for them and for the allocator. With a dense mask the
    factor is above 8 (a test of its own, below, in elements).
    """
    command = [sys.executable, memory_of_training.__file__, "2048", "4096", "8192"]
    env = os.environ | AT_ONCE | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    short, middle, long = json.loads(done.stdout.splitlines()[-1])
    assert short > 25e6, "nothing was measured: the baseline ate the training step"
    assert middle / short < 2.3
    assert long / short < 4.6


def largest(tokens, execution):
    with LargestTensor() as seen:
        memory_of_training.step(memory_of_training.model(), tokens, execution)
    return seen.numel


def test_training_makes_no_tensor_of_rows_by_rows():
    assert largest(8192, "split") < 8192 * 8192 // 8
    # The measure itself notices: the oracle makes one, at a length that it can afford.
    assert largest(2048, "dense") >= 2048 * 2048
