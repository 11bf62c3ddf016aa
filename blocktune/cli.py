"""The entry point: `blocktune` and `python -m blocktune.cli`."""

import gc
import os
import sys


def main() -> None:
    """Runs the command line."""
    # Importing torch and transformers makes a million objects and hardly any garbage. With Python's
    # threshold of 700 the collections during it take a second.
    gc.set_threshold(20_000)
    if os.environ.get("COLUMNS") == "0":  # a terminal with no size yet: rich would print nothing
        del os.environ["COLUMNS"]
    try:
        from blocktune.commands import app
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
