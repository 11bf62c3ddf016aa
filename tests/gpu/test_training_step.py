"""A LoRA step on the device, in the model's dtype."""

import math

from measure import measure_attention, measure_training


def test_training_steps_lower_the_loss(shape):
    losses = measure_training(shape, matmul=1e12)["losses"]
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]


def test_measured_attention_is_exact_too(shape):
    result = measure_attention(shape, matmul=1e12)
    # bfloat16 against bfloat16: two roundings of values of size about one.
    assert result["split_max_abs_diff"] < (1e-5 if shape.dtype == "float32" else 4e-2)
