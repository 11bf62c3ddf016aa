"""Publishing at the end of a training run, from within one of its processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from transformers.integrations import deepspeed

from blocktune.hub.card import CardFacts, served_by
from blocktune.hub.names import check_repo, license_of, on_the_hub
from blocktune.hub.push import prepare, send
from blocktune.prompt import LayoutSpec


class Publisher:
    """What ``push_to_hub`` of a training run asks; see `blocktune.training.run`."""

    def check(self, repo: str, base_model: str, layout: LayoutSpec, token: str | None) -> None:
        """Refuses before the run what could not be published after it.

        Raises:
            ValueError: If the name is none, the base is a local folder, its licence unknown, or
                no method serves the layout.
        """
        check_repo(repo)
        served_by(layout)
        license_of(on_the_hub(base_model), token)

    def publish(self, folder: Path, repo: str, private: bool, token: str | None) -> None:
        """Checks and pushes; says where to.

        Called in one of a run's processes, when the others may be gone.

        Raises:
            ValueError: As `prepare` and `send` do.
        """
        with alone():
            publication = prepare(folder, repo, CardFacts(), token=token)
        sent = send(publication, private=private, token=token)
        Console().print(f"pushed to {sent.url}, commit {sent.revision}", soft_wrap=True)


@contextmanager
def alone() -> Iterator[None]:
    """Inside the block, models load whole into this process, whatever trained before.

    After a run under ZeRO-3, transformers would split every model that it loads over the run's
    processes, and wait for those that do not load it.
    """
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None and (config := config()) is not None:
            deepspeed.set_hf_deepspeed_config(config)
