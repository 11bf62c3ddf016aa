"""Distillation: the divergence, its teacher, what it costs, and that it cuts as any loss does."""

from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from training.runs import losses, make_trainer, write_run
from training.toy import save_toy, toy_config, toy_model, toy_tokenizer
from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

from blocktune import BlockSFTConfig
from blocktune.training.loss import as_teacher, divergence, find_teacher, teacher_probs

SIZE, STEPS = "per_device_train_batch_size", "gradient_accumulation_steps"


def logits(seed: int, rows: int = 5, vocab: int = 11) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_matches_torch(temperature):
    student, teacher = logits(0), logits(1)
    expected = F.kl_div(
        torch.log_softmax(student / temperature, -1),
        torch.log_softmax(teacher / temperature, -1),
        reduction="sum",
        log_target=True,
    )
    made = divergence(student, teacher_probs(teacher, temperature, None), temperature)
    torch.testing.assert_close(made, expected * temperature**2)


def test_top_k_never_exceeds_the_whole_and_reaches_it():
    student, teacher = logits(2), logits(3)
    whole = divergence(student, teacher_probs(teacher, 1.0, None), 1.0)
    parts = [divergence(student, teacher_probs(teacher, 1.0, k), 1.0) for k in (1, 3, 6, 10)]
    assert all(a <= b + 1e-5 for a, b in pairwise(parts))
    assert parts[0] < 0.9 * whole
    torch.testing.assert_close(parts[-1], whole, rtol=1e-4, atol=1e-5)
    assert teacher_probs(teacher, 1.0, 3)[0].shape == (5, 3)


def test_a_student_that_agrees_has_nothing_to_learn():
    made = divergence(logits(4), teacher_probs(logits(4), 1.0, 3), 1.0)
    torch.testing.assert_close(made, torch.tensor(0.0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"distill_weight": 1.5}, r"distill_weight must be a share in \[0, 1\], got 1.5"),
        ({"distill_temperature": 0.0}, "distill_temperature must be above 0"),
        ({"distill_top_k": 0}, "distill_top_k must be at least 1"),
        ({"distill_states": "all"}, "distill_states must be one of none, hidden, kv, got 'all'"),
        ({"distill_states_weight": -1.0}, "distill_states_weight must be a number of at least 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(values, line):
    with pytest.raises(ValueError, match=line):
        BlockSFTConfig("out", use_cpu=True, **values)


def loss_of_step(folder, **options):
    """Loss and gradients of the first step of a run."""
    seen = {}
    trainer = make_trainer(folder, **{"max_steps": 1, "max_grad_norm": 1e9} | options)

    class Grab(type(trainer.callback_handler.callbacks[0])):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen.update({n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad})

    trainer.add_callback(Grab)
    trainer.train()
    return losses(trainer)[0], seen, trainer


DISTILL = {"distill_weight": 0.6, "distill_top_k": 8, "distill_temperature": 2.0, "num_links": 1}


@pytest.mark.parametrize("states", ["none", "hidden", "kv"])
def test_a_batch_may_be_cut_or_packed_in_any_way(tmp_path, states):
    options = DISTILL | {"distill_states": states, "block_share": 0.75, "train_limit": 8}
    whole, gradients, _ = loss_of_step(tmp_path, **options, **{SIZE: 8, STEPS: 1})
    for other in ({SIZE: 1, STEPS: 8}, {SIZE: 8, STEPS: 1, "pack_length": 250}):
        cut, summed, _ = loss_of_step(tmp_path, **options, **other)
        assert cut == pytest.approx(whole, rel=1e-5)
        assert set(summed) == set(gradients)
        for name, gradient in gradients.items():
            torch.testing.assert_close(summed[name], gradient, rtol=1e-4, atol=1e-6)


def test_one_forward_each_and_no_second_model(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, distill_weight=1.0)
    base = trainer.model.get_base_model()
    before = sum(p.numel() for p in trainer.model.parameters())
    seen = []
    base.model.register_forward_hook(lambda module, args, output: seen.append(module.training))
    trainer.train()
    assert seen == [False, True] * 2  # the teacher in evaluation mode, then the student
    assert sum(p.numel() for p in trainer.model.parameters()) == before
    held = [m for m in vars(trainer).values() if isinstance(m, torch.nn.Module)]
    assert all(m is trainer.model or m is trainer.model_wrapped for m in held)


def test_the_teacher_is_the_base_whatever_the_adapter_learnt(tmp_path):
    trainer = make_trainer(tmp_path, learning_rate=5e-2)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    ids = batch["input_ids"]

    def asked():
        with as_teacher(trainer.model) as teacher:
            return teacher(input_ids=ids).logits

    before = asked()
    trainer.train()
    assert torch.equal(asked(), before)
    assert trainer.model.training


@pytest.mark.parametrize("states", ["hidden", "kv"])
def test_states_add_a_loss_that_training_lowers(tmp_path, states):
    options = {"distill_weight": 1.0, "distill_states": states, "distill_states_weight": 30.0}
    options |= {"train_limit": 2, "max_steps": 30, "learning_rate": 2e-3}
    write_run(tmp_path)
    # Keys of the question differ from layer 2 on: what it sees in layer 0 has seen nothing.
    save_toy(tmp_path / "base", config=toy_config(num_hidden_layers=4))
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    errors = [entry["states"] for entry in trainer.state.log_history if "states" in entry]
    assert 0 < errors[-1] < 0.8 * errors[0]


def test_states_survive_activation_checkpointing(tmp_path):
    options = DISTILL | {"distill_states": "kv"}
    one, plain, _ = loss_of_step(tmp_path, **options)
    other, kept, _ = loss_of_step(tmp_path, **options, gradient_checkpointing=True)
    assert other == pytest.approx(one, rel=1e-6)
    for name, gradient in plain.items():
        torch.testing.assert_close(kept[name], gradient)


def test_re_entrant_checkpointing_is_refused_where_it_loses_the_gradient(tmp_path):
    trainer = make_trainer(
        tmp_path,
        **DISTILL | {"distill_states": "kv"},
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": True},
    )
    with pytest.raises(ValueError, match="use_reentrant: false"):
        trainer.train()


def test_training_brings_the_student_to_its_teacher(tmp_path):
    options = {"num_headers": 2, "num_trailers": 2, "freeze_base": True, "use_peft": False}
    trainer = make_trainer(
        tmp_path, **options, distill_weight=1.0, max_steps=30, learning_rate=3e-2, **{SIZE: 8}
    )
    trainer.train()
    apart = [e["divergence"] for e in trainer.state.log_history if "divergence" in e]
    assert sum(apart[-5:]) < 0.8 * sum(apart[:5])


def test_another_model_can_teach(tmp_path):
    teacher = save_toy(tmp_path / "teacher", seed=7)
    write_run(tmp_path)
    mine, _, _ = loss_of_step(tmp_path, distill_weight=1.0)
    its, _, trainer = loss_of_step(tmp_path, distill_weight=1.0, distill_teacher=teacher)
    assert abs(mine - its) > 0.1
    assert trainer.files.info.training["objective"].startswith("100% KL to the teacher")


def test_another_teacher_is_loaded_whole_under_zero3(tmp_path):
    """DeepSpeed would gather the weights of the student only."""
    teacher = save_toy(tmp_path / "teacher", seed=7)
    options = BlockSFTConfig(str(tmp_path), distill_weight=1.0, distill_teacher=teacher)
    student, zero3 = toy_model(), HfDeepSpeedConfig({"zero_optimization": {"stage": 3}})
    try:
        with find_teacher(options, student, toy_tokenizer(), True)(student) as loaded:
            assert all(weight.numel() for weight in loaded.parameters())
        assert zero3.is_zero3()
    finally:
        unset_hf_deepspeed_config()


def test_a_teacher_that_does_not_fit_is_refused(tmp_path):
    small = save_toy(tmp_path / "small", config=toy_config(vocab_size=500))
    options = {"distill_weight": 1.0, "distill_teacher": small}
    with pytest.raises(ValueError, match="has another tokenizer, chat template or vocabulary"):
        make_trainer(tmp_path, **options)
    with pytest.raises(ValueError, match="cannot load distill_teacher"):
        make_trainer(tmp_path, **options | {"distill_teacher": str(tmp_path / "none")})
    with pytest.raises(ValueError, match="not the base after full fine-tuning"):
        make_trainer(tmp_path, distill_weight=1.0, use_peft=False)


@pytest.mark.parametrize(
    ("states", "config", "what"),
    [
        ("hidden", {"num_hidden_layers": 3}, "layers': 3.*, the student .*layers': 2"),
        ("kv", {"num_key_value_heads": 4}, "key heads': 4.*, the student .*key heads': 2"),
        ("kv", {"head_dim": 16}, "width of a head': 16.*, the student .*width of a head': 8"),
        (
            "kv",
            {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
            "RoPE': .* 500000.0.*, the student",
        ),
    ],
)
def test_states_of_another_shape_are_refused(tmp_path, states, config, what):
    other = save_toy(tmp_path / "other", config=toy_config(**config))
    options = {"distill_weight": 0.5, "distill_states": states, "distill_teacher": other}
    with pytest.raises(ValueError, match=what):
        make_trainer(tmp_path, **options)
