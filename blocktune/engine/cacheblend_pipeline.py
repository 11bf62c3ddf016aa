"""CacheBlend's loading controller: how much to recompute while chunks are loading, and from where.

Loading layer ``i + 1`` and recomputing layer ``i`` run at the same time, so recomputing a larger
share costs nothing as long as a layer takes longer to load.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass

KEEP = 0.8
"""Weight of what was measured before; the rest is the latest measurement's."""


@dataclass(frozen=True)
class LoadingChoice:
    """What the controller chose for one batch, and from what.

    Attributes:
        ratio: Share of the context tokens that is recomputed.
        tier: Where the chunks are kept from now on: ``disk`` where loading hides behind recomputing
            the least share, else ``memory``.
        bytes_read: Bytes that are read from the folder.
        load_s: Seconds to load a layer at the measured bandwidth; None before any was measured.
        recompute_s: Seconds to recompute ``ratio`` of a layer at the measured speed, or None.
    """

    ratio: float
    tier: str
    bytes_read: int
    load_s: float | None
    recompute_s: float | None


class LoadingController:
    """Measures bandwidth and compute, and chooses by them. Thread-safe.

    Source: CacheBlend arXiv:2405.16444, section 5: the largest ratio whose recomputing a layer
    takes no longer than loading one, never below a floor; and the cheapest device from which
    loading takes no longer than recomputing the floor.
    """

    def __init__(self):
        """Nothing is measured yet."""
        self.bytes_per_s: float | None = None
        self.row_layer_s: float | None = None
        self._lock = threading.Lock()

    def saw_reading(self, num_bytes: int, seconds: float) -> None:
        """Notes what was read from the folder and how long that took."""
        if num_bytes and seconds > 0:
            with self._lock:
                self.bytes_per_s = _mixed(self.bytes_per_s, num_bytes / seconds)

    def saw_computing(self, row_layers: int, seconds: float) -> None:
        """Notes how long it took to compute so many rows, each counted once per layer."""
        if row_layers and seconds > 0:
            with self._lock:
                self.row_layer_s = _mixed(self.row_layer_s, seconds / row_layers)

    def choose(
        self, floor: float, context_tokens: int, num_layers: int, num_bytes: int
    ) -> LoadingChoice:
        """The share to recompute, and the tier.

        Args:
            floor: Least share, which quality asks for (the paper: 0.15).
            context_tokens: Tokens of the chunks of the batch.
            num_layers: Layers of the model.
            num_bytes: Bytes that must come from the folder.
        """
        with self._lock:
            bandwidth, row_s = self.bytes_per_s, self.row_layer_s
        whole_s = None if row_s is None else row_s * context_tokens
        load_s = None if bandwidth is None else num_bytes / bandwidth / num_layers
        if not num_bytes:
            load_s = 0.0
        if whole_s is None or load_s is None:
            recompute_s = None if whole_s is None else floor * whole_s
            return LoadingChoice(floor, "memory", num_bytes, load_s, recompute_s)
        ratio = min(1.0, max(floor, load_s / whole_s)) if whole_s else floor
        tier = "disk" if num_bytes and load_s <= floor * whole_s else "memory"
        return LoadingChoice(ratio, tier, num_bytes, load_s, ratio * whole_s)


def _mixed(old: float | None, new: float) -> float:
    return new if old is None else KEEP * old + (1 - KEEP) * new
