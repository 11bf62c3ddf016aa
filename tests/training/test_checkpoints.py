"""Checkpoints: a resumed run is the run that was never stopped, and a kill loses no older one."""

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from training.runs import losses, make_trainer, write_run
from training.test_trainer import MODES
from training.toy import toy_examples

from blocktune.adapter import AdapterInfo
from blocktune.data.example import write_jsonl
from blocktune.files import locked
from blocktune.links import load_links


def counted(trainer) -> list[int]:
    return [entry["num_tokens"] for entry in trainer.state.log_history if "loss" in entry]


RESUMABLE = {mode: MODES[mode] for mode in ("lora+table", "table alone", "lora+tokens", "full")}


@pytest.mark.parametrize("mode", RESUMABLE)
def test_resume_matches_no_stop(tmp_path, mode):
    options = RESUMABLE[mode] | {"max_steps": 6, "block_share": 0.5, "seed": 7}
    # Two steps an epoch: it is stopped in the middle of the second.
    options |= {"train_limit": 4, "train_sampling_strategy": "group_by_length"}
    options |= {"save_strategy": "steps", "save_steps": 3}
    if options.get("use_peft", True):
        options["lora_dropout"] = 0.1  # the random state must come back too
    whole = make_trainer(tmp_path, **options)
    whole.train()
    expected = losses(whole)
    assert len(set(expected)) == 6

    shutil.rmtree(tmp_path / "out/checkpoint-6")
    resumed = make_trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == expected
    assert counted(resumed) == counted(whole)
    for one, other in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", RESUMABLE)
def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path, mode):
    falling = iter((3.0, 2.0, 1.0))
    options = RESUMABLE[mode] | {"max_steps": 3, "learning_rate": 0.1, "save_total_limit": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_score"}
    options |= {"greater_is_better": True, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"save_strategy": "steps", "save_steps": 1}
    write_run(tmp_path)
    write_jsonl(tmp_path / "eval.jsonl", toy_examples(2))
    trainer = make_trainer(tmp_path, eval_data=str(tmp_path / "eval.jsonl"), **options)
    trainer.compute_metrics = lambda _: {"score": next(falling)}
    trainer.train()
    best = tmp_path / "out/checkpoint-1"
    assert trainer.state.best_model_checkpoint == str(best)
    assert json.loads((best / "trainer_state.json").read_text())["best_model_checkpoint"] == str(
        best
    )
    trainer.save_model()
    for path in best.glob("*.safetensors"):
        saved, final = load_file(path), load_file(tmp_path / "out" / path.name)
        assert all(torch.equal(saved[name], final[name]) for name in saved | final)
    assert AdapterInfo.load(tmp_path / "out").training["steps"] == 1


def scored(folder, scores, **options):
    """A trainer of learned tokens that gets these scores, one an evaluation; the highest wins."""
    options = {"max_steps": 4, "load_best_model_at_end": True, "greater_is_better": True} | options
    options |= {"metric_for_best_model": "eval_score", "eval_strategy": "steps", "eval_steps": 1}
    write_run(folder)
    write_jsonl(folder / "eval.jsonl", toy_examples(2))
    options |= {"save_strategy": "steps", "eval_data": str(folder / "eval.jsonl")}
    trainer = make_trainer(folder, **RESUMABLE["table alone"], **options)
    scores = iter(scores)
    trainer.compute_metrics = lambda _: {"score": next(scores)}
    return trainer


def test_the_best_checkpoint_of_a_moved_run(tmp_path):
    options = {"save_steps": 1, "save_total_limit": 2}
    scored(tmp_path, (4.0, 3.0), **options, max_steps=2).train()
    (tmp_path / "out").rename(moved := tmp_path / "moved")
    options |= {"output_dir": str(moved)}
    resumed = scored(tmp_path, (2.0, 1.0), **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.best_model_checkpoint == str(moved / "checkpoint-1")
    assert {path.name for path in moved.glob("checkpoint-*")} == {"checkpoint-1", "checkpoint-4"}
    resumed.save_model()
    best, final = load_links(moved / "checkpoint-1"), load_links(moved)
    assert torch.equal(best.weight, final.weight)
    assert AdapterInfo.load(moved).training["steps"] == 1
    shutil.rmtree(moved / "checkpoint-1")
    with pytest.raises(ValueError, match=r"best checkpoint, '.*moved/checkpoint-1', is not there"):
        scored(tmp_path, (), **options).train(resume_from_checkpoint=True)


def test_the_best_step_is_one_that_is_saved(tmp_path):
    trainer = scored(tmp_path, (1.0, 2.0, 4.0, 3.0), save_steps=2)
    trainer.train()
    trainer.save_model()
    last, final = load_links(tmp_path / "out/checkpoint-4"), load_links(tmp_path / "out")
    assert torch.equal(last.weight, final.weight)
    assert AdapterInfo.load(tmp_path / "out").training["steps"] == 4


def test_a_clock_that_was_ahead_removes_no_new_checkpoint(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    make_trainer(tmp_path, max_steps=2, **options).train()
    for path in (tmp_path / "out").glob("checkpoint-*"):
        os.utime(path, (4e9, 4e9))
    make_trainer(tmp_path, max_steps=4, **options).train(resume_from_checkpoint=True)
    left = {path.name for path in (tmp_path / "out").glob("checkpoint-*")}
    assert left == {"checkpoint-3", "checkpoint-4"}


def test_a_second_run_in_the_same_folder_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    with locked(tmp_path / "out/.lock"), pytest.raises(ValueError, match="another process is"):
        trainer.train()
    trainer.train()
    assert not (tmp_path / "out/.lock").exists()


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=3, learning_rate=1e30)
    with pytest.raises(ValueError, match=r"train loss after step \d is nan.*learning_rate"):
        trainer.train()


def test_what_a_killed_run_was_about_to_save_is_left_out(tmp_path):
    stale = tmp_path / "out/.saving"
    for name in ("checkpoint-99", "adapter"):
        (stale / name).mkdir(parents=True)
        (stale / name / "links.safetensors").write_text("of another run")
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model()
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {".saving", "links.safetensors"}


class _Killed(Exception):
    pass


def test_a_kill_while_saving_leaves_the_older_checkpoint(tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_links": 1}
    trainer = make_trainer(tmp_path, **options, save_total_limit=1)
    save = trainer._save_optimizer_and_scheduler

    def die_at_step_4(folder):
        if trainer.state.global_step == 4:
            raise _Killed
        save(folder)

    trainer._save_optimizer_and_scheduler = die_at_step_4
    with pytest.raises(_Killed):
        trainer.train()
    out = tmp_path / "out"
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-2"]

    resumed = make_trainer(tmp_path, **options, save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-4"]
    assert len(load_links(out / "checkpoint-4").weight) == 1
    assert json.loads((out / "checkpoint-4/trainer_state.json").read_text())["global_step"] == 4
