"""Checkpoints: a resumed run is the run that was never stopped, and a kill loses no older one."""

import json
import shutil

import pytest
import torch
from training.runs import losses, make_trainer
from training.test_trainer import MODES

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
