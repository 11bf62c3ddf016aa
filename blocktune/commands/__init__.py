"""The commands by topic. Heavy packages such as torch are imported only when a command runs."""

from importlib import import_module

from blocktune.commands.application import app

__all__ = ["app"]

# The order in which the help lists them.
for topic in (
    *("answer", "train", "evaluate", "serve", "data", "make_data", "store", "check", "bench"),
):
    import_module(f"blocktune.commands.{topic}")
