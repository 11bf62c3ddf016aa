"""RULER: long-context tasks generated from a seed, their contexts cut into chunks.

Source: RULER, arXiv:2404.06654, https://github.com/NVIDIA/RULER (``scripts/data/synthetic``); what
differs is said where it does.
"""

from blocktune.data.ruler.generate import RulerConfig, generate_ruler
from blocktune.data.ruler.needle import NeedleConfig, generate_needles
from blocktune.data.ruler.tasks import RULER_TASKS, RulerTask

__all__ = [
    "RULER_TASKS",
    "NeedleConfig",
    "RulerConfig",
    "RulerTask",
    "generate_needles",
    "generate_ruler",
]
