"""What ``push_to_hub`` of a run means here: one push of the finished adapter, checked first."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from blocktune.prompt import LayoutSpec
from blocktune.training.config import BlockSFTConfig

_MUST_BE = {
    "hub_strategy": ("every_save", "end"),  # transformers' default, and what is done
    "hub_always_push": (False,),
    "hub_revision": (None,),
}
"""Options of transformers' own push that a single push at the end would ignore."""


class Publisher(Protocol):
    """Publishes adapters; handed in, since training knows nothing of serving and checking."""

    def check(self, repo: str, base_model: str, layout: LayoutSpec, token: str | None) -> None:
        """Refuses before the run what could not be published after it."""

    def publish(self, folder: Path, repo: str, private: bool, token: str | None) -> None:
        """Publishes a finished run."""


def checked_repo(args: BlockSFTConfig, base_model: str, publisher: Publisher | None) -> str | None:
    """Where a run is pushed to, or None; the Trainer, which would push unchecked, is not told.

    Raises:
        ValueError: If it cannot be pushed, or not as the options say.
    """
    if not args.push_to_hub:
        return None
    if publisher is None or not args.hub_model_id:
        raise ValueError(
            "push_to_hub needs hub_model_id: USER/NAME, and a program that publishes: "
            "`blocktune train` or recipes/train.py"
        )
    for name, accepted in _MUST_BE.items():
        if (value := getattr(args, name)) not in accepted:
            raise ValueError(
                f"{name}: {getattr(value, 'value', value)} is not supported; push_to_hub pushes "
                "once, when the run is over, to the main branch; leave it out"
            )
    publisher.check(args.hub_model_id, base_model, args.layout, args.hub_token)
    args.push_to_hub = False
    return args.hub_model_id
