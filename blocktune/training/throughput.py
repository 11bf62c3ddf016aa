"""How fast a run is, in real tokens, and how well it uses its machine."""

from __future__ import annotations

import time
from dataclasses import dataclass, field


@dataclass
class Speedometer:
    """Turns counts of tokens into rates, from one log to the next.

    Attributes:
        flops_per_token: Operations of one row, see `blocktune.training.cost.row_flops`.
        rate: Operations per second of matrix products on all processes together.
    """

    flops_per_token: float
    rate: float
    _time: float = field(default=0.0, init=False)
    _tokens: float = field(default=0.0, init=False)
    _step: int = field(default=0, init=False)

    def start(self, tokens: float, step: int) -> None:
        """Starts the clock, also after a resume."""
        self._time, self._tokens, self._step = time.perf_counter(), tokens, step

    def read(self, tokens: float, step: int, last_step: int) -> dict[str, float]:
        """Rates since the last reading.

        Args:
            tokens: Rows trained on so far that are no padding, over all processes.
            step: Optimizer steps so far.
            last_step: Of the run.

        Returns:
            ``tokens_per_second``, ``mfu`` (share of the machine's matmul rate that went into
            products with weights) and ``eta_s`` (seconds that are left at this speed).
        """
        now = time.perf_counter()
        elapsed = max(now - self._time, 1e-9)
        speed = (tokens - self._tokens) / elapsed
        left = (last_step - step) * elapsed / max(step - self._step, 1)
        self._time, self._tokens, self._step = now, tokens, step
        mfu = speed * self.flops_per_token / self.rate
        return {"tokens_per_second": speed, "mfu": mfu, "eta_s": left}
