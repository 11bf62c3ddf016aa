"""Trains an adapter: `accelerate launch recipes/train.py --config recipes/block_attention.yaml`."""

import os
import sys

from blocktune.hub import Publisher
from blocktune.training.run import leave, train

if __name__ == "__main__":
    try:
        train(sys.argv[1:], publisher=Publisher())
    except (ValueError, OSError, KeyboardInterrupt) as error:
        stopped = isinstance(error, KeyboardInterrupt)  # its text says how to continue
        if os.environ.get("LOCAL_RANK", "0") == "0":  # on each machine, since files may be missing
            print("stopped:" if stopped else "error:", *str(error).split(), file=sys.stderr)
        sys.exit(130 if stopped else 2)
    leave()
