"""The commands by topic. Heavy packages such as torch are imported only when a command runs."""

from importlib import import_module

from blocktune.commands.application import app

__all__ = ["app"]

# The order in which the help lists them.
TOPICS = ("answer", "train", "evaluate", "serve", "data", "make_data", "store", "check", "bench")
for topic in TOPICS:
    import_module(f"blocktune.commands.{topic}")
