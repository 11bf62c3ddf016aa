"""The commands by topic; heavy packages, such as torch, are imported when a command runs."""

from importlib import import_module

from blocktune.commands.application import app

__all__ = ["app"]

# In the order of the help.
for topic in (
    *("answer", "train", "evaluate", "serve", "data", "make_data", "store", "check", "bench"),
):
    import_module(f"blocktune.commands.{topic}")
