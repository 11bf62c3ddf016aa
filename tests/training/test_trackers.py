"""`report_to`: what the log says reaches a tracker; one that is missing is refused at once."""

import pytest
from training.runs import make_trainer


def test_a_tracker_gets_speed_and_loss(tmp_path):
    trainer = make_trainer(tmp_path, report_to="tensorboard", max_steps=2)
    trainer.train()
    (events,) = (tmp_path / "out").rglob("events.out.tfevents.*")
    written = events.read_bytes()
    for tag in ("loss", "tokens_per_second", "mfu", "learning_rate", "mean_token_accuracy"):
        assert f"train/{tag}".encode() in written, tag


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("wandb", "report_to: wandb cannot be used .*pip install wandb.*or set report_to: none"),
        ("paper", "paper is not supported, only .*tensorboard.*are supported"),
    ],
)
def test_a_tracker_that_is_not_there_is_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, report_to=name)
    assert not (tmp_path / "out").exists()


def test_a_name_that_nothing_has_is_told_before_the_run(tmp_path, caplog):
    """A metric that no evaluation measures; a module, of which PEFT needs only one."""
    evaluated = {"eval_strategy": "steps", "eval_data": str(tmp_path / "train.jsonl")}
    trainer = make_trainer(tmp_path, metric_for_best_model="eval_los", **evaluated)
    with pytest.raises(ValueError, match=r"one of .*'mean_token_accuracy'.* got 'eval_los'"):
        trainer.train()
    for option, known in {"target_modules": "q_proj", "modules_to_save": "norm"}.items():
        names = {"lora_target_modules": ["q_proj", "v_proj"], f"lora_{option}": [known, "no_proj"]}
        make_trainer(tmp_path, **names)
        assert f"{option}: the model has no module 'no_proj'" in caplog.text
