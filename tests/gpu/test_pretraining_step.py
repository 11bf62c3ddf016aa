"""Pre-training's step as one CUDA graph takes the weights where the same step launched does."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from examples.tiny_model.config import PretrainConfig, Stage
from examples.tiny_model.contexts import MicroBatch
from examples.tiny_model.stepping import Stepper

VOCAB, LENGTH, ROWS, STEPS = 64, 32, 4, 6


def stepped(device: str, recorded: bool) -> tuple[list[float], torch.Tensor]:
    """Losses of a few steps on the same batches, and the embeddings after them."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    ).to(device)
    stages = (Stage(2, STEPS, LENGTH),)
    config = PretrainConfig(stages=stages, rows_per_step=ROWS * LENGTH, device=device)
    stepper = Stepper(model, config, torch.tensor([1], device=device))
    assert bool(stepper.graphs) == (device == "cuda")
    if not recorded:
        stepper.graphs.clear()
    draw = torch.Generator().manual_seed(1)
    losses = []
    for step in range(STEPS):
        ids = torch.randint(2, VOCAB, (ROWS, LENGTH), generator=draw)
        weights = torch.randint(0, 3, (ROWS, LENGTH), generator=draw).float()
        batch = MicroBatch(ids.to(device), weights.to(device))
        loss, weight, *_ = stepper([batch], (step + 1) / STEPS).tolist()
        losses.append(loss / weight)
    return losses, model.get_input_embeddings().weight.detach().float().cpu()


def test_a_recorded_step_is_the_step_that_is_launched(device):
    losses, weights = stepped(device, recorded=True)
    expected, wanted = stepped(device, recorded=False)
    assert losses == pytest.approx(expected, rel=1e-2)
    torch.testing.assert_close(weights, wanted, rtol=0, atol=2e-2)
    assert len({round(loss, 6) for loss in losses}) == STEPS
