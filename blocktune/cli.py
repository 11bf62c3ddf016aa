"""The entry point: `blocktune` and `python -m blocktune.cli`."""

import os
import signal


def main() -> None:
    """Runs the command line."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # a shell may have set it to be ignored
        # Nothing is lost before a command begins; Ctrl-C during imports would show a traceback.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    from blocktune.commands import app

    if os.environ.get("COLUMNS") == "0":  # a terminal with no size yet: rich would print nothing
        del os.environ["COLUMNS"]
    try:
        app(obj=lambda: signal.signal(signal.SIGINT, usual))
    finally:
        signal.signal(signal.SIGINT, usual)


if __name__ == "__main__":
    main()
