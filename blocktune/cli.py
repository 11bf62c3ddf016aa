"""The entry point: `blocktune` and `python -m blocktune.cli`."""

import gc
import os
import signal


def main() -> None:
    """Runs the command line."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # a shell may have set it to be ignored
        # Nothing is lost before a command begins; Ctrl-C during imports would show a traceback.
        signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    # Importing torch and transformers makes a million objects and hardly any garbage. With Python's
    # threshold of 700 the collections during it take a second.
    thresholds = gc.get_threshold()
    gc.set_threshold(20_000, *thresholds[1:])
    from blocktune.commands import app

    if os.environ.get("COLUMNS") == "0":  # a terminal with no size yet: rich would print nothing
        del os.environ["COLUMNS"]
    try:
        app(obj=lambda: signal.signal(signal.SIGINT, usual))
    finally:
        signal.signal(signal.SIGINT, usual)
        gc.set_threshold(*thresholds)


if __name__ == "__main__":
    main()
