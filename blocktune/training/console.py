"""A console that a closed pipe cannot stop, and how amounts and durations read."""

from __future__ import annotations

import os
import sys

from rich.console import Console


class SteadyConsole(Console):
    """A console that falls silent when nobody reads on, instead of ending the process.

    Rich leaves by ``SystemExit`` when its pipe is closed (``blocktune train ... | head``): a run
    would stop in the middle without an error, and its folder stay empty.
    """

    def on_broken_pipe(self) -> None:
        """Goes on in silence; the run still trains and saves."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, whichever reads best."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def amount(size: float) -> str:
    """Bytes as MiB or GiB."""
    return f"{size / 2**20:.0f} MiB" if size < 2**30 else f"{size / 2**30:.1f} GiB"
