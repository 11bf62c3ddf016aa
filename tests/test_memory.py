"""Training memory grows with the prompt's length, not with its square."""

import json

import forked
import memory_of_training
from largest_tensor import LargestTensor


def test_peak_memory_of_training_grows_linearly():
    """8,192 tokens in 32 chunks, forward and backward, on the shipped tiny model's shape.

    With 64 query rows: what many fresh rows take is in attention/test_masks.py.

    Linear growth from 4,096 is a factor of 2. The query's mask (rows x N, with rows fixed) and
    the keys are linear too; 2.3 leaves room for them and for the allocator. With a dense mask the
    factor is near 4 (a test of its own, below, in elements).
    """
    done = forked.run([memory_of_training.__file__, "4096", "8192"])
    assert done.returncode == 0, done.stderr
    short, long = json.loads(done.stdout.splitlines()[-1])
    assert short > 50e6, "nothing was measured: the baseline ate the training step"
    assert long / short < 2.3


def largest(tokens, execution):
    with LargestTensor() as seen:
        memory_of_training.step(memory_of_training.model(), tokens, execution)
    return seen.numel


def test_training_makes_no_tensor_of_rows_by_rows():
    assert largest(8192, "split") < 8192 * 8192 // 8
    # The measure itself notices: the oracle makes one, at a length that it can afford.
    assert largest(2048, "dense") >= 2048 * 2048
