"""Several processes share the batches of one run, each on a GPU of its own or several on one."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import TypeVar

from blocktune.evaluation.suite import Suite

Item = TypeVar("Item")
PATIENCE = timedelta(days=7)
"""How long one process waits for another before the run is given up."""


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: Its number, from 0.
        count: How many there are.
        device: Where it runs; None leaves that to the suite.
        wait: Returns once every process has called it.
    """

    rank: int = 0
    count: int = 1
    device: str | None = None
    wait: Callable[[], None] = lambda: None

    @property
    def is_main(self) -> bool:
        """Whether this process merges, times and reports."""
        return self.rank == 0

    def placed(self, suite: Suite) -> Suite:
        """The suite on this process's own device."""
        return suite if self.device is None else replace(suite, device=self.device)

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """This process's part of ``items``; all processes must be given the same ones."""
        return items[self.rank :: self.count]


def launched() -> Processes:
    """The processes that ``accelerate launch`` or ``torchrun`` started, or this one alone.

    More processes than GPUs take turns on them: a small model leaves most of one idle.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes()
    import torch
    from accelerate import PartialState

    gpus = torch.cuda.device_count()
    crowded = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > gpus  # NCCL wants one process a GPU
    state = PartialState(cpu=crowded, timeout=PATIENCE)
    atexit.register(state.destroy_process_group)
    device = f"cuda:{state.local_process_index % gpus}" if gpus else "cpu"
    # accelerate's barrier names the GPU of the process's number, which a shared one is not.
    wait = torch.distributed.barrier if crowded else state.wait_for_everyone
    return Processes(state.process_index, state.num_processes, device, wait)
