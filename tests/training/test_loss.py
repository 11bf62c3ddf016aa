"""The loss is one number, however a global batch is cut and attention is executed."""

import pytest
import torch
from training.runs import make_trainer
from training.toy import toy_examples, toy_model, toy_tokenizer

from blocktune.attention import attach, make_plan
from blocktune.layout import Layout
from blocktune.links import install_links, link_base, new_links
from blocktune.prompt import Batch, LayoutSpec
from blocktune.training.collator import BlockDataCollator
from blocktune.training.dataset import in_modes, prepare
from blocktune.training.loss import answer_rows

SPEC = LayoutSpec(num_links=2)


@pytest.fixture
def model():
    model = toy_model()
    install_links(model, new_links(model, 2))
    attach(model)
    return model


def answer_loss(model, ids, layout, labels, execution="split"):
    plan = make_plan(execution, layout)
    return answer_rows(model, Batch(ids, layout, labels), plan).sums(layout)


def batches(model, size, share=0.5):
    samples = in_modes(toy_examples(8), share)
    dataset = prepare(samples, BlockDataCollator(toy_tokenizer(), SPEC).reader, limit=500).dataset
    collator = BlockDataCollator(toy_tokenizer(), SPEC, link_base=link_base(model))
    for start in range(0, 8, size):
        batch = collator([dataset[i] for i in range(start, start + size)])
        yield batch["input_ids"], Layout.unpack(batch["layout"]), batch["labels"]


def total_and_gradients(model, size, execution="split"):
    model.zero_grad()
    results = [answer_loss(model, *batch, execution) for batch in batches(model, size)]
    num_tokens = sum(int(result.tokens) for result in results)
    for result in results:
        (result.total / num_tokens).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return sum(float(r.total.detach()) for r in results) / num_tokens, gradients


@pytest.mark.parametrize("size", [1, 2, 4])
def test_loss_and_gradients_of_small_batches_match_the_whole_one(model, size):
    whole, gradients = total_and_gradients(model, 8)
    parts, summed = total_and_gradients(model, size)
    assert parts == pytest.approx(whole, rel=1e-5)
    for name, gradient in gradients.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-5)


def test_split_matches_dense_in_loss_and_gradients(model):
    split, one = total_and_gradients(model, 4, "split")
    dense, other = total_and_gradients(model, 4, "dense")
    assert split == pytest.approx(dense, rel=1e-5)
    for name, gradient in one.items():
        torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-5)


def test_the_layout_matters_to_the_loss(model):
    ids, layout, labels = next(batches(model, 8, share=1.0))
    block = float(answer_loss(model, ids, layout, labels).total.detach())
    full = layout.map(lambda field: field.clone())
    full.group.fill_(-1)
    assert abs(block - float(answer_loss(model, ids, full, labels).total.detach())) > 1e-2


def test_loss_matches_cross_entropy_over_all_logits(model):
    ids, layout, labels = next(batches(model, 8))
    plan = make_plan("dense", layout)
    logits = model(ids, position_ids=layout.position, plan=plan, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"
    )
    result = answer_loss(model, ids, layout, labels, "dense")
    torch.testing.assert_close(result.total, expected)
    assert int(result.tokens) == int((labels != -100).sum())
    hits = (logits[:, :-1].argmax(-1) == labels[:, 1:]).sum()
    assert int(result.correct) == int(hits)


def first_step(folder, **overrides):
    """Loss and gradients of the trainer's own first step."""
    seen = {}
    trainer = make_trainer(folder, max_steps=1, num_links=1, max_grad_norm=1e9, **overrides)

    class Grab(type(trainer.callback_handler.callbacks[0])):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    trainer.add_callback(Grab)
    trainer.train()
    return next(e["loss"] for e in trainer.state.log_history if "loss" in e), seen


def test_trainer_accumulates_exactly(tmp_path):
    size, steps = "per_device_train_batch_size", "gradient_accumulation_steps"
    whole, gradients = first_step(tmp_path / "a", **{size: 8, steps: 1})
    parts, summed = first_step(tmp_path / "b", **{size: 1, steps: 8})
    assert parts == pytest.approx(whole, rel=1e-5)
    assert set(gradients) == set(summed)
    assert len(gradients) > 10
    for name, gradient in gradients.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("execution", ["split", "dense"])
def test_packed_rows_match_unpacked_ones(tmp_path, execution):
    """Links, both modes and fresh rows included; the dense oracle sees no leak either."""
    size = {"per_device_train_batch_size": 16, "train_limit": 12, "block_share": 0.75}
    size |= {"recompute": "deviation", "attention_execution": execution, "block_dropout": 0.5}
    one, plain = first_step(tmp_path / "a", **size)
    other, packed = first_step(tmp_path / "b", **size, pack_length=250)
    assert other == pytest.approx(one, rel=1e-5)
    for name, gradient in plain.items():
        torch.testing.assert_close(packed[name], gradient, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_changes_nothing(tmp_path):
    one, plain = first_step(tmp_path / "a", gradient_checkpointing=False)
    other, checkpointed = first_step(tmp_path / "b", gradient_checkpointing=True)
    assert one == pytest.approx(other, rel=1e-6)
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient)
