"""The plan before a run and the log during it: what they count; a closed pipe ends nothing."""

import json
import multiprocessing
import os
import sys
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from training.runs import make_trainer, write_run
from training.toy import toy_examples, toy_model
from transformers import TrainerState

from blocktune.data.example import write_jsonl
from blocktune.tables import written
from blocktune.training.plan import (
    LogLines,
    Speedometer,
    duration,
    expected_peak,
    make_plan,
    matmul_rate,
    peak_bytes,
    print_plan,
    row_flops,
    size_of,
)
from blocktune.training.run import build, parse


def test_operations_are_those_of_the_weights():
    """Counted from the shapes of a Llama layer, in floating point operations."""
    model = toy_model()
    hidden, kv, ffn, layers = 32, 16, 64, 2
    weights = layers * (2 * hidden * hidden + 2 * hidden * kv + 3 * hidden * ffn)
    size = size_of(model, state_bytes=4)
    assert (size.matmul, size.trained, size.trainable) == (
        weights,
        weights,
        sum(p.numel() for p in model.parameters()),
    )
    assert row_flops(size, has_teacher=False) == 6 * weights
    assert row_flops(size, has_teacher=True) == 8 * weights
    frozen = size_of(model.requires_grad_(False), state_bytes=4)
    assert row_flops(frozen, has_teacher=False) == 4 * weights


def test_memory_grows_with_what_is_kept():
    size = size_of(toy_model(), state_bytes=4)
    fixed = peak_bytes(size, rows=0, logits=0, checkpointing=False)
    assert fixed == (4 + 4 + 8) * size.parameters
    kept = [peak_bytes(size, 1000, 0, checkpointing) - fixed for checkpointing in (False, True)]
    assert kept[1] < kept[0]
    logits = peak_bytes(size, 0, 10, False) - fixed
    assert logits == 10 * size.config.vocab_size
    masks = peak_bytes(size, 0, 0, False, mask_cells=1000) - fixed
    assert masks == 1000 * 4


def test_the_plan_counts_masks_up_to_what_is_kept(tmp_path, monkeypatch):
    trainer = built(tmp_path, recompute="deviation")
    whole = expected_peak(trainer)
    monkeypatch.setattr("blocktune.training.plan.KEPT_CELLS", 0)
    width = 2 * max(trainer.train_dataset["length"])  # a fresh row for every token
    masks = width**2 * trainer.args.per_device_train_batch_size * trainer.size.state_bytes
    assert whole - expected_peak(trainer) == masks


@contextmanager
def autograd_keeps(model, state_bytes):
    """Yields a list that gets the bytes of the tensors saved in the block."""
    real, saved = [], {}

    def keep(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    weights = {p.data_ptr() for p in model.parameters()}
    half = torch.autocast("cpu", torch.bfloat16, enabled=state_bytes == 2)
    with half, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        yield real
    real.append(sum(size for pointer, size in saved.items() if pointer not in weights))


def test_scores_that_a_cpu_keeps_in_half_precision_are_counted(tmp_path):
    """Of small blocks, see `kernels.FEW_SCORES`: half of what a run with chunks of 150 keeps."""
    path = write_run(tmp_path, bf16=True, distill_weight=1.0)
    rows = [
        replace(e, chunks=(e.chunks[0].text * 20, e.chunks[1].text * 20)) for e in toy_examples(2)
    ]
    write_jsonl(tmp_path / "train.jsonl", rows)
    trainer = build(*parse(["--config", str(path)]))
    batch = trainer.data_collator(list(trainer.train_dataset))
    with autograd_keeps(trainer.model, 2) as real:
        trainer.compute_loss(trainer.model, batch)
    expected = expected_peak(trainer) - trainer.size.fixed_bytes
    assert expected / 1.3 < real[0] < expected * 1.3


@pytest.mark.parametrize("state_bytes", [4, 2])
def test_expected_states_are_near_what_autograd_keeps(state_bytes):
    """Saved tensors of a real forward pass, against the formula: within a factor of 1.5."""
    model, rows = toy_model().train(), 64
    with autograd_keeps(model, state_bytes) as saved:
        model.model(torch.randint(0, model.config.vocab_size, (1, rows)), use_cache=False)
    [real] = saved
    size = size_of(model, state_bytes)
    fixed = peak_bytes(size, 0, 0, checkpointing=False)
    expected = peak_bytes(size, rows, 0, checkpointing=False) - fixed
    assert expected / 1.5 < real < expected * 1.5


def test_the_matmul_rate_is_a_rate():
    assert matmul_rate("cpu", torch.float32, seconds=0.01) > 1e6


def test_speed_is_tokens_over_time(monkeypatch):
    times = iter([10.0, 12.0, 13.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    speed = Speedometer(flops_per_token=50.0, rate=1000.0)
    speed.start(tokens=100, step=4)
    assert speed.read(tokens=120, step=6, last_step=10) == {
        "tokens_per_second": 10.0,
        "mfu": 0.5,
        "eta_s": 4.0,
    }
    assert speed.read(tokens=123, step=7, last_step=10)["tokens_per_second"] == 3.0


def test_more_than_the_machine_can_do_is_not_shown(capsys):
    """The rate of matrix products was measured while the machine was busy."""
    speed = Speedometer(flops_per_token=1e12, rate=1.0)
    speed.start(tokens=0, step=0)
    rates = speed.read(tokens=1000, step=1, last_step=2)
    assert rates.keys() == {"tokens_per_second", "eta_s"}
    state = TrainerState(global_step=1, max_steps=2, is_world_process_zero=True)
    for logs, shown in ((rates, False), (rates | {"mfu": 0.5}, True)):
        logs = logs | {"loss": 1.0, "learning_rate": 0.1}
        LogLines().on_log(None, state, None, logs=logs)
        assert ("MFU" in capsys.readouterr().out) is shown


def test_trackers_get_speed_too(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(e["tokens_per_second"] > 0 and e["mfu"] > 0 and e["eta_s"] >= 0 for e in logged)
    assert logged[-1]["eta_s"] == 0


def built(folder, **options):
    return build(*parse(["--config", str(write_run(folder, **options))]))


def test_the_plan_says_up_to_which_length_reuse_is_exact(tmp_path):
    assert "exact up to" not in make_plan(make_trainer(tmp_path))
    path = tmp_path / "base/config.json"
    config = json.loads(path.read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    path.write_text(json.dumps(config))
    said = make_plan(make_trainer(tmp_path))["exact up to"]
    assert said == f"{config['max_position_embeddings']:,} tokens; longer examples: refuse"


def test_the_plan_says_what_is_trained_and_how(tmp_path, capsys):
    trainer = built(
        tmp_path,
        num_headers=2,
        distill_weight=0.5,
        recompute="random",
        recompute_max=0.3,
        pack_length=300,
    )
    print_plan(make_plan(trainer))
    text = capsys.readouterr().out
    for words in (
        "block 100%, num_headers 2",
        "cross-entropy, 50% KL to the teacher 'self', 15% to 30% of the tokens fresh (random)",
        "packed rows",
        "peak memory",
    ):
        assert words in text


def test_a_dry_run_needs_no_value(tmp_path, capsys):
    from blocktune.training.run import train

    assert train(["--config", str(write_run(tmp_path)), "--dry-run"]) is None
    assert "training plan" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("seconds", "text"), [(12, "12 s"), (600, "10 min"), (7200, "2.0 h"), (89.6, "90 s")]
)
def test_durations_read_well(seconds, text):
    assert duration(seconds) == text


def test_amounts_read_well():
    assert [written("bytes", size) for size in (2**20 * 5, 2**30 * 3.26)] == ["5 MiB", "3.3 GiB"]


def print_into_a_closed_pipe() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    sys.stdout = os.fdopen(writer, "w")
    print_plan({"base": "nobody reads this"})
    state = TrainerState(is_world_process_zero=True)
    LogLines().on_log(None, state, None, logs={"train_runtime": 1.0})
    os._exit(0)


def test_a_closed_pipe_ends_no_run():
    """Training continues when the reader of its output is gone (`blocktune train ... | head`)."""
    process = multiprocessing.get_context("fork").Process(target=print_into_a_closed_pipe)
    process.start()
    process.join(60)
    assert process.exitcode == 0
