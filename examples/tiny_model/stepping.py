"""An optimiser step: direct on a CPU, as a CUDA graph for each shape on a GPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from examples.tiny_model.config import PretrainConfig
from examples.tiny_model.contexts import MicroBatch
from examples.tiny_model.gradients import backward, make_optimizers

_WARM_UPS = 3


class Stepper:
    """Takes optimiser steps.

    A step of so small a model has some thousand kernels of a few microseconds each. Launching them
    takes five times as long as running them. A CUDA graph launches them all at once.
    """

    def __init__(self, model: nn.Module, config: PretrainConfig, given: Tensor):
        """Creates the optimisers, and on a GPU records a step for the shape of every stage.

        Args:
            model: The model, on ``config.device``.
            config: The settings of the run.
            given: See `backward`; on the model's device.
        """
        self.model, self.config, self.given = model, config, given
        self.optimizers = make_optimizers(model, config)
        self.graphs: dict[torch.Size, tuple[torch.cuda.CUDAGraph, MicroBatch, Tensor]] = {}
        if config.device == "cuda":
            for length in sorted({stage.length for stage in config.stages}):
                self._record(config.rows_per_step // length, length)
            self._reset()

    def __call__(self, batches: Sequence[MicroBatch], rate: float) -> Tensor:
        """Takes one step.

        Args:
            batches: The batches of this process; on a GPU only one, of a stage's shape.
            rate: Learning rate, relative to the peak.

        Returns:
            A `Tally` as a tensor ``(5,)``, float64.
        """
        for optimizer, peak in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"].fill_(peak * rate)
        if not self.graphs:
            return self._step(batches)
        (batch,) = batches
        graph, static, sums = self.graphs[batch.ids.shape]
        for target, source in zip(static, batch, strict=True):
            target.copy_(source, non_blocking=True)
        graph.replay()
        return sums.clone()

    def _step(self, batches: Sequence[MicroBatch]) -> Tensor:
        sums = backward(self.model, batches, self.given)
        nn.utils.clip_grad_norm_(self.model.parameters(), self.config.clip)
        for optimizer, _ in self.optimizers:
            optimizer.step()
        self.model.zero_grad(set_to_none=False)
        return sums

    def _record(self, count: int, length: int) -> None:
        """Records a step over ``(count, length)`` rows; with zero weights it has no gradient."""
        static = MicroBatch(
            torch.zeros(count, length, dtype=torch.long, device=self.given.device),
            torch.zeros(count, length, device=self.given.device),
        )
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._step([static])
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            sums = self._step([static])
        self.graphs[static.ids.shape] = graph, static, sums

    def _reset(self) -> None:
        """Resets the optimisers' states and step counts, which AdamW's bias correction uses."""
        for optimizer, _ in self.optimizers:
            for state in optimizer.state.values():
                for value in state.values():
                    value.zero_()
