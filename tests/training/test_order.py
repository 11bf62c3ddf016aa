"""The order of an epoch: every row once, decided by seed and epoch alone."""

import pytest
import torch
from training.runs import make_trainer

from blocktune.training import order
from blocktune.training.order import EpochOrder

LENGTHS = [(37 * i) % 101 for i in range(64)]


@pytest.mark.parametrize("group", [None, 4])
def test_an_epoch_has_every_row_once_and_ends_with_the_blank_ones(group):
    rows_of = EpochOrder([*LENGTHS, 5, 5], num_blank=2, group=group, seed=3)
    epochs = []
    for epoch in range(3):
        rows_of.epoch = epoch
        torch.manual_seed(epoch)  # the global stream is in another state
        rows = list(rows_of)
        torch.manual_seed(epoch + 100)
        assert list(rows_of) == rows
        assert sorted(rows[:-2]) == list(range(64))
        assert rows[-2:] == [64, 65]
        epochs.append(rows)
    assert epochs[0] != epochs[1] != epochs[2]
    other = EpochOrder([*LENGTHS, 5, 5], num_blank=2, group=group, seed=4)
    assert list(other) != epochs[0]
    assert len(rows_of) == 66


def test_groups_are_of_similar_length():
    """Of 16 groups of 4 the first may hold the longest row, which goes first; sorted in fours."""
    grouped = list(EpochOrder(LENGTHS, num_blank=0, group=4, seed=0))
    mixed = list(EpochOrder(LENGTHS, num_blank=0, group=None, seed=0))

    def spread(rows):
        fours = [[LENGTHS[row] for row in rows[i : i + 4]] for i in range(0, 64, 4)]
        return sum(max(four) - min(four) for four in fours)

    assert spread(grouped) < 0.5 * spread(mixed)


def test_a_group_is_a_step_over_accumulation(tmp_path):
    trainer = make_trainer(
        tmp_path,
        train_sampling_strategy="group_by_length",
        gradient_accumulation_steps=4,
        train_limit=32,
        seed=9,
    )
    drawn = trainer._get_train_sampler()
    assert (drawn.group, drawn.seed, drawn.num_blank) == (8, 9, 0)


def test_training_on_a_cpu_returns_freed_memory(tmp_path, monkeypatch):
    trimmed = []
    monkeypatch.setattr(order, "trim_memory", lambda: trimmed.append(1))
    trainer = make_trainer(tmp_path, max_steps=2)
    trainer.train()
    assert trimmed == []  # it was not yet due
    monkeypatch.setattr(order, "TRIM_S", 0.0)
    make_trainer(tmp_path / "b", max_steps=2).train()
    assert len(trimmed) == 2
